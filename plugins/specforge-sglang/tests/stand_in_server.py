"""Stands in for an SGLang server: answers over HTTP, and hands frames over with the real sender.

python stand_in_server.py PORT '{"delay": 0.01, ...}'.  The state of layer i at a token is
100 * i + token, the final state 7 + token, the next token is the token + 1 and the log-sum-exp
half of it, so that a test knows what must come back.  An answer is the prompt's last token, again
and again, up to `max_new_tokens`, or 9 where that is an end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from specforge_sglang_capture.ask import PROTOCOL, parse
from specforge_sglang_capture.frame import pack, pack_error
from specforge_sglang_capture.sender import Parcel, Sender

SIZES = {"num_layers": 6, "width": 32}


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: dict[str, Any] = {}  # noqa: RUF012
    served = 0
    sender: Sender

    def do_GET(self) -> None:
        info = {
            "version": "0.5.14",
            "disable_radix_cache": True,
            "chunked_prefill_size": -1,
            "disable_cuda_graph": True,
            "device": "cuda",
            "pp_size": 1,
        }
        self.answer(200, info | self.options.get("info", {}) | {"served": Server.served})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/options":
            Server.options = body
            return self.answer(200, {})
        ids = torch.tensor(body["input_ids"])
        if len(ids) > 500:
            message = f"the input is longer than 500 tokens ({body.get('rid')})."
            return self.answer(400, {"error": {"message": message}})
        Server.served += 1
        fault = self.options.get("fault")
        if len(ids) == 3 and not self.options.get("at_once"):
            fault = None  # the engine's first look
        time.sleep(self.options.get("delay", 0.0) if len(ids) != 3 else 0)
        if fault == "dies" and Server.served > self.options.get("after", 0):
            os._exit(9)
        if "rid" not in body:
            return self.answer(200, said(body))
        if fault != "silent":
            self.hand_over(body["rid"], ids, fault)
        cached = 3 if fault == "cached" else 0
        return self.answer(200, {"output_ids": [1], "meta_info": {"cached_tokens": cached}})

    def hand_over(self, rid: str, ids: torch.Tensor, fault: str | None) -> None:
        ask = parse(rid)
        assert ask is not None
        count = SIZES["num_layers"] - (fault == "layers")
        protocol = PROTOCOL + (fault == "protocol")
        header = {
            "protocol": protocol,
            "name": ask.name,
            "layers": list(ask.layers),
            "final": ask.final,
        }
        header |= {"num_layers": count}
        if fault == "refuses":
            pieces = pack_error(header, "the model has no layer setter")
            self.sender.put(Parcel(ask, 0, lambda: pieces))
            return
        rows = ids[:-1] if fault == "rows" else ids.flip(0) if fault == "tokens" else ids
        width = SIZES["width"] // (2 if fault == "width" else 1)
        states = [(100.0 * i + rows)[:, None].repeat(1, width) for i in ask.layers]
        if ask.final != "none":
            states.append((7.0 + rows)[:, None].repeat(1, width))
        head = {"next_tokens": rows + (1000 if fault == "next" else 1), "logsumexp": rows / 2}
        packed = pack(header, rows, states, **{name: head[name] for name in ask.head})
        if fault == "torn":
            packed = packed[:-1]
        self.sender.put(Parcel(ask, 0, lambda: packed))

    def answer(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def said(body: dict[str, Any]) -> dict[str, Any]:
    sampling = body["sampling_params"]
    ends = 9 in sampling["stop_token_ids"]
    tokens = [9] if ends else [body["input_ids"][-1]] * sampling["max_new_tokens"]
    reason = {"type": "stop" if ends else "length"}
    return {"output_ids": tokens, "meta_info": {"finish_reason": reason}}


class Listener(ThreadingHTTPServer):
    request_queue_size = 128


if __name__ == "__main__":
    Server.options = json.loads(sys.argv[2])
    Server.sender = Sender()
    Listener(("127.0.0.1", int(sys.argv[1])), Server).serve_forever()
