"""Programs in processes of their own: Triton's interpreter is on or off for a whole process."""

import json
import os
import subprocess
import sys


def without_interpreter(script: str, cases: list[dict], cache):
    """What the test file `script`, run with the cases as JSON, prints as JSON. Triton's cache lies in `cache`."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, script], input=json.dumps(cases), env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


FORKED = """
import json, os, sys
exec(sys.argv[1])
for line in sys.stdin:
    reader, writer = os.pipe()
    if os.fork() == 0:
        code = 1
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        try:
            exec(json.loads(line), {"__name__": "__main__"})
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with open(reader) as said:
        text = said.read()
    _, status = os.wait()
    print(json.dumps([os.waitstatus_to_exitcode(status), text]), flush=True)
"""


class Forks:
    """A process that has imported what several programs need, and runs each in a fork of itself."""

    def __init__(self, imports: str, folder, environment: dict[str, str]):
        command = [sys.executable, "-c", FORKED, imports]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def run(self, code: str) -> str:
        """What the program prints."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        status, said = json.loads(self.process.stdout.readline())
        assert status == 0, said[-2000:]
        return said

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
