"""Prepared rows are not kept between tests; those of the cache itself turn it on."""

import os

os.environ["PEFTCTL_NO_CACHE"] = "1"
