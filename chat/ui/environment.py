"""The switches that Gradio and the hub library read when they are imported. Standard library only."""

import os
import shutil
from pathlib import Path


def quiet(data_dir: Path, *, offline: bool = False) -> None:
    """No analytics, no record of what is typed, uploads in a folder of ours. Call before anything imports gradio.

    Uploads of an earlier run are removed. `offline` also keeps the hub library from the network.
    """
    uploads = data_dir / "uploads"
    shutil.rmtree(uploads, ignore_errors=True)
    switches = {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
        "GRADIO_SHARE": "False",
        "GRADIO_MCP_SERVER": "False",
        "GRADIO_SSR_MODE": "False",
        "GRADIO_TEMP_DIR": str(uploads),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }
    os.environ.update(switches | ({"HF_HUB_OFFLINE": "1"} if offline else {}))
