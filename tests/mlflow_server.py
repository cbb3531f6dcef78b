"""An MLflow server of the tests' own, in memory, on loopback."""

import http.server
import json
import threading
import time


class Store(http.server.ThreadingHTTPServer):
    """As much of MLflow's REST API as a run needs, in memory; can fail on request."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0, runs: dict | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.runs = {} if runs is None else runs
        self.failing = False
        self.delay = 0.0
        self.requests = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def die(self) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, call: str, body: dict) -> dict:
        if call == "experiments/get-by-name":
            return {"experiment": {"experiment_id": "1", "name": "trial", "lifecycle_stage": "active"}}
        if call == "runs/create":
            run_id = f"{len(self.runs) + 1:032x}"
            self.runs[run_id] = {"status": "RUNNING", "steps": [], "params": {}}
            return {"run": self.describe(run_id)}
        run = self.runs.get(body.get("run_id"))
        if run is None:
            raise LookupError
        if call == "runs/log-batch":
            run["steps"] += [metric["step"] for metric in body.get("metrics", []) if metric["key"] == "loss"]
            run["params"].update({param["key"]: param["value"] for param in body.get("params", [])})
        elif call == "runs/update":
            run["status"] = body["status"]
            return {"run_info": self.describe(body["run_id"])["info"]}
        return {"run": self.describe(body["run_id"])}

    def describe(self, run_id: str) -> dict:
        run = self.runs[run_id]
        info = {"run_id": run_id, "run_uuid": run_id, "experiment_id": "1", "status": run["status"]}
        params = [{"key": key, "value": value} for key, value in run["params"].items()]
        return {"info": {**info, "lifecycle_stage": "active", "artifact_uri": "/"}, "data": {"params": params}}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Store

    def do_POST(self) -> None:
        from urllib.parse import parse_qsl, urlsplit

        self.server.requests += 1
        url = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(raw) if raw else dict(parse_qsl(url.query))
        time.sleep(self.server.delay)
        if self.server.failing:
            return self.reply(500, {"error_code": "INTERNAL_ERROR", "message": "broken"})
        try:
            self.reply(200, self.server.answer(url.path.split("/mlflow/")[1], body))
        except LookupError:
            self.reply(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"})

    do_GET = do_POST

    def reply(self, code: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass
