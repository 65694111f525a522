"""`python -m adaattn` is the command `adaattn`."""

from .cli import main

raise SystemExit(main())
