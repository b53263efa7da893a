"use strict";
const get = (id) => document.getElementById(id);
const messages = [];
let running = null;

function show(role, text) {
  const line = document.createElement("p");
  line.className = role;
  line.textContent = text;
  get("talk").append(line);
  line.scrollIntoView();
  return line;
}

async function* read(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line !== "data: [DONE]") yield JSON.parse(line.slice("data: ".length));
    }
  }
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  show("user", text);
  const answer = show("assistant", "");
  running = new AbortController();
  get("send").textContent = "Stop";
  get("note").textContent = "";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ messages, stream: true, stream_options: { include_usage: true } }),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    const start = performance.now();
    for await (const chunk of read(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) answer.textContent += choice.delta.content ?? "";
      answer.scrollIntoView({ block: "end" });
      if (chunk.usage) {
        const speed = chunk.usage.completion_tokens / ((performance.now() - start) / 1000);
        get("note").textContent = `${chunk.usage.completion_tokens} tokens, ${speed.toFixed(0)} a second`;
      }
    }
  } catch (error) {
    get("note").textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
  messages.push({ role: "assistant", content: answer.textContent });
  running = null;
  get("send").textContent = "Send";
}

get("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = get("text").value.trim();
  if (running) running.abort();
  else if (text) {
    get("text").value = "";
    ask(text);
  }
});
get("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    get("form").requestSubmit();
  }
});
fetch("v1/models").then((response) => response.json()).then((models) => { get("model").textContent = models.data[0].id; });
