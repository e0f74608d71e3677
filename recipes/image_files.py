"""The former place of `recipes.data.image_files`, which is still read for one release."""

import sys

from recipes.data import image_files

sys.modules[__name__] = image_files
