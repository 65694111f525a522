"""The benchmark suite behind `adaattn bench` and `adaattn profile`.

`suite` says what is measured and `contenders` who is compared; `heads`, `timing`, `roofline` and `memory` are
the instruments; `results` is what a run found, `changes` what differs between two; `tables`, `figures` and
`page` show it. `profile` watches the attention of somebody's program.
"""
