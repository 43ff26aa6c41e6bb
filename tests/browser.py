"""Headless Chromium for the tests that look at a page, driven by its DevTools protocol over two pipes.

    with Browser(folder) as browser:
        browser.open(page, width=390, dark=True)
        browser.ask("document.title")
        assert browser.errors == [] and browser.requests == []

Messages are JSON that ends in a zero byte: Chromium reads them from descriptor 3 and writes to 4.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

NAMES = "chromium", "chromium-browser", "google-chrome"
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
MISSING = "Chromium is not installed: apt-get install chromium"
LOCAL = "data:", "file:", "about:"                                      # addresses that need no network
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
PATIENCE = 120                                                          # seconds: two cores, other tests


class Browser:
    """A browser with one tab. errors are those of its console, requests what it asked of a network."""

    def __init__(self, folder):
        self.errors, self.requests, self.events, self.number, self.rest = [], [], [], 0, b""
        pipes = os.pipe(), os.pipe()
        self.commands, self.answers = pipes[0][1], pipes[1][0]
        own = pipes[0][0], pipes[1][1]
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in own]   # neither 3 nor 4
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
                 "--disable-background-networking", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen([PROGRAM, *flags], pass_fds=(3, 4), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        preexec_fn=lambda: [os.dup2(theirs[0], 3), os.dup2(theirs[1], 4)])
        for end in (*theirs, *own):
            os.close(end)
        self.session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.answers)
        os.close(self.commands)

    def read(self, until):
        """The next message of the browser. Raises TimeoutError where none comes in time."""
        while b"\0" not in self.rest:
            if not select.select([self.answers], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError("the browser does not answer")
            if not (block := os.read(self.answers, 2 ** 20)):
                raise EOFError(f"the browser has ended with {self.process.wait()}")
            self.rest += block
        line, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(line)
        method, values = message.get("method"), message.get("params", {})
        self.events.append(method)
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(values["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.errors.append(str(values["args"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(values["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests += [url for url in [values["request"]["url"]] if not url.startswith(LOCAL)]
        return message

    def send(self, method, **values):
        """The result of a command of the protocol."""
        self.number += 1
        message = dict(id=self.number, method=method, params=values)
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while (answer := self.read(until)).get("id") != self.number:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def open(self, path, width=1280, dark=False):
        """Open a page, at this width and in this palette."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=False)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=path.absolute().as_uri())
        until = time.monotonic() + PATIENCE
        while "Page.loadEventFired" not in self.events:
            self.read(until)

    def ask(self, script):
        """The value of a JavaScript expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def hover(self, x, y):
        """Move the pointer to a place of the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key):
        """Press a key and release it."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=KEYS.get(key, 0))

    def screenshot(self, whole=False):
        """The window as a PNG, or the whole page."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
