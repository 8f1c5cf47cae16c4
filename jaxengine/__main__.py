"""`python -m jaxengine`: the command line."""

from jaxengine.command.main import main

raise SystemExit(main())
