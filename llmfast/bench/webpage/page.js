"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

function draw() {
  const style = getComputedStyle(document.documentElement);
  const [ink, line] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
  const narrow = innerWidth < 600;
  const axis = { automargin: true, gridcolor: line, zerolinecolor: line, linecolor: line };
  for (const { name, traces, layout } of figures) {
    const title = (one) => (one && one.title ? { title: { text: one.title } } : {});
    Plotly.react(name, traces, {
      ...layout,
      xaxis: { ...axis, ...layout.xaxis, ...title(layout.xaxis) },
      yaxis: { ...axis, ...layout.yaxis, ...title(layout.yaxis) },
      font: { color: ink, family: "system-ui, sans-serif", size: narrow ? 11 : 13 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", traceorder: "normal" },
      margin: { l: 10, r: 20, t: 30, b: 10 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      dragmode: false,
    }, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

draw();
dark.addEventListener("change", draw);
