"""Start the program and fetch its page: `python tests/browser/look.py MODEL DATA_DIR`. For a place without a network."""

import os
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

if __name__ == "__main__":
    from tests.browser.test_app_browser import running

    with running("--model", sys.argv[1], "--port", "0", "--data-dir", sys.argv[2], environment=dict(os.environ)) as url:
        page = urllib.request.urlopen(url, timeout=20).read().decode()
    assert "chat/page/page.js" in page
    print("the page is there")
