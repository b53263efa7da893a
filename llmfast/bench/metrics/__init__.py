"""What a bundle is measured by: one file, one metric.

Every file defines `ORDER` (place in the table), `TASKS` (none means all), `NEEDS` (of `tokenizer`,
`vocab_size`, `example_inputs`), `HIGHER_IS_BETTER` (key -> bool; a key may name the shape of the input: always with
`{shape}`, only where there are several with `{case}`), `COLUMNS`, and a `KIND`; with `OPTION` it is measured only where
that option of `BenchOptions` is given. The kinds:

- `static`: `measure(subject) -> figures`, once, after the speed rounds.
- `speed`: `measure(subject, trial) -> figures`, once per round.
- `quality`: `UNIT`, `DATA` (what --data takes, empty when nothing), `COMPARED` (keys that mean something without a
  baseline, so that a change is worth a verdict), and four functions. `prepare(bundle, data, options)` makes items;
  `answer(subject, item)` is an array; `compare(item, answer, baseline's answer)` gives float64 [units, fields];
  `figures(rows)` turns the rows of all items into figures. Two more where needed: `retokenize(bundle, items)` makes the
  items (with `ids`) of a bundle with another tokenizer, `finish(rows)` does once what looks at all rows before figures
  are drawn.

`measure`, `answer` and `compare` run in the bundle's process, the others in the parent.
"""
