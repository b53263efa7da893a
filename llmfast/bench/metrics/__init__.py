"""What a bundle is measured by: one file, one metric.

Every file defines `ORDER` (place in the table), `TASKS` (none means all), `NEEDS` (of `tokenizer`,
`vocab_size`, `example_inputs`), `HIGHER_IS_BETTER` (key -> bool; a key may hold `{shape}`), `COLUMNS`, and a `KIND`:

- `static`: `measure(subject) -> figures`, once, after the speed rounds.
- `speed`: `measure(subject, trial) -> figures`, once per round.
- `quality`: `UNIT`, `DATA` (what --data takes, empty when nothing), and four functions.
  `prepare(bundle, data, options)` makes items; `answer(subject, item)` is an array; `compare(item, answer,
  baseline's answer)` gives float64 [units, fields]; `figures(rows)` turns the rows of all items into figures.

`measure`, `answer` and `compare` run in the bundle's process, `prepare` and `figures` in the parent.
"""
