"""What a model is for: one file, one task, named as on the Hugging Face hub.

Every file defines `AUTO_MODEL` (the class of transformers that loads a checkpoint), `OUTPUTS` (of its graph), and

- `answer(bundle, texts, provider, threads, **options)`: one dictionary a text, with `text` in it (an image has `image`,
  its path; a recording its path in `audio` and in `text` what was said).
- `spell(answer)`: an answer for people.
- `INFER_OPTIONS`: the options of `llmfast infer` that `answer` takes as keywords.
- `needed_options(bundle)`: those of them that no text can be answered without; a task that needs none leaves it out.
- `TEXT_OPTION`: the option of `llmfast infer` that gives the texts, where it is not `prompt`; `image` and
  `audio` give paths of files.
- `read_input(bundle, path)`, of tasks of images or sound that give labels: the graph's input for one file, by name.
- `INPUT`: the graph's input that is not made of text, where there is one: `pixel_values`, `input_values`.
"""
