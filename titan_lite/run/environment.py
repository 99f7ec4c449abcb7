"""Environment variables in which a launcher speaks to its workers. Users set none of them."""

from __future__ import annotations

LAUNCHER_PID = "TITAN_LITE_LAUNCHER_PID"
"""Who the launcher is: its workers die with it."""

STORE = "TITAN_LITE_STORE"
"""Path of the workers' FileStore on a single node; several nodes meet through torchrun's variables."""
