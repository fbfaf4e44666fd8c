"""From `python app.py` to the first word on the page, with the bundled model and a browser that is already open.

python tests/benchmarks/bench_start.py [--runs 5] [--model M]
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from playwright.sync_api import sync_playwright

from tests.browser.conftest import CHROMIUM, FLAGS
from tests.browser.test_app_browser import running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model")
    given = parser.parse_args()
    flags = ["--model", given.model] if given.model else []
    served, answered = [], []
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS)) as browser:
        for _ in range(given.runs):
            with tempfile.TemporaryDirectory() as data:
                begun = time.perf_counter()
                with running(*flags, "--port", "0", "--data-dir", data) as url:
                    served.append(time.perf_counter() - begun)
                    tab = browser.new_page()
                    tab.goto(url)
                    tab.wait_for_selector("body.ready")
                    tab.fill("#box textarea", "Hello!")
                    tab.press("#box textarea", "Enter")
                    tab.wait_for_selector("article.assistant .text:not(:empty)")
                    answered.append(time.perf_counter() - begun)
                    tab.close()
            print(f"page served after {served[-1]:.2f} s, first word after {answered[-1]:.2f} s", flush=True)
    print(f"median: served {statistics.median(served):.2f} s, first word {statistics.median(answered):.2f} s")


if __name__ == "__main__":
    main()
