"""A headless Chromium, driven through chromedriver's WebDriver protocol with the standard library alone."""

import base64
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


class Browser:
    """One browser with its own empty profile in `folder`; use it in a `with`."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(
            m[1] for line in self.process.stdout if (m := re.search(r"started successfully on port (\d+)", line))
        )
        self.url = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS.split(), f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.url += "/" + self.call("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def call(self, path: str, method: str = "POST", **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as e:  # its body says what went wrong
            raise AssertionError(e.read().decode(errors="replace")[:2000]) from None

    def open(self, page: Path, width: int = 1280, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
        self.call("/url", url=page.resolve().as_uri())

    def run(self, script: str, *args):
        """What `script` returns, or what the promise that it returns becomes."""
        return self.call("/execute/sync", script=script, args=args)

    def keys(self, selector: str, text: str) -> None:
        """Type `text` into the element, as a user at a keyboard does."""
        found = self.call("/element", using="css selector", value=selector)
        self.call(f"/element/{next(iter(found.values()))}/value", text=text)

    def errors(self) -> list[str]:
        return [x["message"] for x in self.call("/se/log", type="browser") if x["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("/screenshot", "GET")))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("", "DELETE")
        finally:
            self.process.terminate()
            self.process.wait(10)
