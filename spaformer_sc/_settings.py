"""Defaults of a session: what `sf.settings` is."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from ._checks import _did_you_mean, check_choice, check_flag, check_number
from ._logging import logger

VERBOSITIES = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}
CACHE_VARIABLE = "SPAFORMER_SC_DATA"
"""Environment variable that names the folder of downloads."""
MIB = 2**20


class _OnStandardError(logging.Handler):
    """Prints messages as plain lines, where the user's own logging does not show them already."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr)


_shown = _OnStandardError()


class SessionSettings:
    """Defaults for all calls of a session; ``sf.settings`` is the one there is. What is given to a call wins.

    Attributes
    ----------
    verbosity
        Messages that are shown: ``"error"``, ``"warning"``, ``"info"`` (what is done and written) or ``"debug"``, or 0
        to 3. It is the level of the logger ``spaformer_sc``. Once it is set, messages go to standard error unless
        logging has handlers of your own. Until then it is what ``logging`` says, ``"warning"`` by default.
    device
        What ``device="auto"`` stands for: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …; ``"auto"``, the default, is the first
        GPU if there is one, else the CPU.
    progress
        Whether progress bars are shown where ``progress`` is not given; True by default.
    cache_dir
        Folder of downloaded data sets. None, when set, returns to the default: what the environment variable
        ``SPAFORMER_SC_DATA`` names, or else the cache folder of the operating system.
    cache_size
        Graphs and positional encodings that are kept in memory, to be found again by the next call, take so many MiB
        at most; 256 by default, 0 keeps none.

    Examples
    --------
    >>> sf.settings.verbosity = "info"
    >>> sf.settings.device = "cpu"
    >>> sf.settings
    """

    def __init__(self) -> None:
        self._device = "auto"
        self._progress = True
        self._cache_dir: Path | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        known = [option for option, found in vars(type(self)).items() if isinstance(found, property)]
        if name not in known and not name.startswith("_"):
            raise AttributeError(f"`settings` has no `{name}`.{_did_you_mean(name, known)} It has: {', '.join(known)}.")
        super().__setattr__(name, value)

    @property
    def verbosity(self) -> str:
        """Messages that are shown."""
        level = logger.getEffectiveLevel()
        return next((name for name, least in VERBOSITIES.items() if level >= least), "debug")

    @verbosity.setter
    def verbosity(self, value: str | int) -> None:
        check_choice("settings.verbosity", value, (*VERBOSITIES, *range(len(VERBOSITIES))))
        logger.setLevel(VERBOSITIES[value] if isinstance(value, str) else list(VERBOSITIES.values())[value])
        if _shown not in logger.handlers:
            logger.addHandler(_shown)

    @property
    def device(self) -> str:
        """What ``device="auto"`` stands for."""
        return self._device

    @device.setter
    def device(self, value: str) -> None:
        if isinstance(value, str) and value == "auto":
            self._device = value
            return
        from .model import resolve_device

        self._device = str(resolve_device(value, "settings.device"))

    @property
    def progress(self) -> bool:
        """Whether progress bars are shown."""
        return self._progress

    @progress.setter
    def progress(self, value: bool) -> None:
        self._progress = check_flag("settings.progress", value)

    @property
    def cache_dir(self) -> Path:
        """Folder of downloaded data sets."""
        import pooch

        return Path(self._cache_dir or os.environ.get(CACHE_VARIABLE) or pooch.os_cache("spaformer_sc")).expanduser()

    @cache_dir.setter
    def cache_dir(self, value: str | os.PathLike[str] | None) -> None:
        if value is not None and not isinstance(value, str | os.PathLike):
            raise TypeError(f"`settings.cache_dir={value!r}` must be a path or None, not {type(value).__name__}.")
        folder = None if value is None else Path(value).expanduser()
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"`settings.cache_dir={os.fspath(folder)!r}` is a file; name a folder.")
        self._cache_dir = folder

    @property
    def cache_size(self) -> float:
        """MiB of graphs and positional encodings that are kept in memory, at most."""
        from ._cache import remembered

        return remembered.capacity / MIB

    @cache_size.setter
    def cache_size(self, value: float) -> None:
        from ._cache import remembered

        remembered.resize(int(MIB * check_number("settings.cache_size", value, 0, 2**30)))

    def __repr__(self) -> str:
        return "\n".join(
            [
                "spaformer_sc settings",
                f"  verbosity   {self.verbosity!r}",
                f"  device      {self.device!r}",
                f"  progress    {self.progress}",
                f"  cache_dir   {os.fspath(self.cache_dir)!r}",
                f"  cache_size  {self.cache_size:g} MiB",
            ]
        )

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if not name.startswith("_")]


settings = SessionSettings()
