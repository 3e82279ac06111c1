"""What is on disk: checkpoints, the journal, the run directory, PEFT's files."""

from fedalt.store.checkpoint import (
    CLIENTS,
    COUNTED,
    NEXT,
    OPTIMIZER,
    SERVER,
    Checkpoint,
    Draft,
    StateFolder,
    StoredState,
    load_latest,
    write_atomic,
    write_state,
    writing,
)
from fedalt.store.journal import Journal, Progress
from fedalt.store.peft_files import as_peft_files, free_folder, read_peft_adapter, write_folder
from fedalt.store.rundir import (
    CONFIG,
    RESULTS,
    claim_run_dir,
    free_run_dir,
    load_run,
    refuse_changes,
    settings_of,
    sole_writer,
)

__all__ = [
    "CLIENTS",
    "CONFIG",
    "COUNTED",
    "NEXT",
    "OPTIMIZER",
    "RESULTS",
    "SERVER",
    "Checkpoint",
    "Draft",
    "Journal",
    "Progress",
    "StateFolder",
    "StoredState",
    "as_peft_files",
    "claim_run_dir",
    "free_folder",
    "free_run_dir",
    "load_latest",
    "load_run",
    "read_peft_adapter",
    "refuse_changes",
    "settings_of",
    "sole_writer",
    "write_atomic",
    "write_folder",
    "write_state",
    "writing",
]
