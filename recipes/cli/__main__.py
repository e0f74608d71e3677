"""`python -m recipes.cli COMMAND`."""

import sys

from recipes.cli.parser import main

sys.exit(main())
