"""`python -m jaxengine`: the command line."""
from jaxengine.cli import main

raise SystemExit(main())
