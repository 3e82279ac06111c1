"""``python -m fedalt`` is the ``fedalt`` command."""

from fedalt.cli import main

raise SystemExit(main())
