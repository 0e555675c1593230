"""``python -m archspec`` is the ``archspec`` command."""

import sys

from archspec.commands import main

sys.exit(main())
