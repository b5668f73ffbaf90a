"""The one logger of the package. No handler is installed at import."""

from __future__ import annotations

import logging

logger = logging.getLogger("spaformer_sc")
