"""The client against a server that misbehaves in the ways that hosted ones do, which no real one does on demand.

What a real server makes of it stands in tests/study/test_served.py and tests/tasks/generation.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gapprobe.chat.base import Reply, Request
from gapprobe.chat.kept import FILE, KeptReplies
from gapprobe.chat.server import GIVE_UP, ChatServer, ServerSettings, data_url
from gapprobe.errors import ConfigError, ModelError, OutputError

Answer = Callable[[dict], tuple[int, object, dict[str, str]]]


def said(text: object, **more: object) -> tuple[int, object, dict[str, str]]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | more
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    return 200, {"id": "1", "object": "chat.completion", "model": "m-1", "choices": [choice], "usage": usage}, {}


class Misbehaving:
    """A server whose next answers are given; it remembers what it was asked."""

    def __init__(self) -> None:
        self.answer: Answer = lambda body: said(body["messages"][-1]["content"][-1]["text"].upper())
        self.asked: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.most = self._now = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.asked.append(body)
                    outer.headers.append({k.lower(): v for k, v in self.headers.items()})
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                try:
                    status, told, headers = outer.answer(body)
                finally:
                    with lock:
                        outer._now -= 1
                data = told if isinstance(told, bytes) else json.dumps(told).encode()
                self.send_response(status)
                for name, value in ({"content-type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    made = Misbehaving()
    yield made
    made.close()


@pytest.fixture
def chat(server, tmp_path) -> Callable[..., ChatServer]:
    def make(folder: str = "kept", **settings: object) -> ChatServer:
        told = {"url": server.url, "retries": 0, "timeout": 20.0} | settings
        return ChatServer(ServerSettings.model_validate(told), "m", tmp_path / folder)

    return make


def replies(chat: ChatServer, *requests: Request) -> list[Reply]:
    found = dict(chat.ask(requests))
    assert sorted(found) == list(range(len(requests)))
    return [found[i] for i in range(len(requests))]


def test_replies_come_with_their_requests_and_are_kept(server, chat) -> None:
    asked = [Request(text) for text in "abcab"]
    found = replies(chat(), *asked)
    assert [reply.text for reply in found] == list("ABCAB")
    assert found[0] == Reply("A", prompt_tokens=7, completion_tokens=2, model="m-1")
    assert len(server.asked) == 3  # equal requests are sent once
    assert replies(chat(), *asked) == found
    assert len(server.asked) == 3
    replies(chat(), Request("a", temperature=1.0), Request("a", seed=1), Request("a", image=b"\x89PNG\r\n\x1a\nx"))
    assert len(server.asked) == 6
    replies(chat("elsewhere"), asked[0])
    assert len(server.asked) == 7


def test_what_is_sent(server, chat) -> None:
    picture = b"\xff\xd8\xff-a picture"
    schema = {"type": "object"}
    request = Request("q", picture, "be brief", 9, 0.5, 3, ("##",), schema, True)
    replies(chat(json_schema=True, log_probs=True, length_field="max_completion_tokens"), request)
    body = server.asked[0]
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert body["messages"][1]["content"] == [
        {"type": "image_url", "image_url": {"url": data_url(picture)}},
        {"type": "text", "text": "q"},
    ]
    assert data_url(picture).startswith("data:image/jpeg;base64,")
    assert (body["max_completion_tokens"], body["temperature"], body["seed"], body["stop"]) == (9, 0.5, 3, ["##"])
    assert body["response_format"]["json_schema"]["schema"] == schema
    assert body["logprobs"] is True
    # A server that was not said to take these does not get them.
    replies(chat("other", stop=False, sampling=False), request)
    assert set(server.asked[1]) == {"model", "messages", "max_tokens"}
    with pytest.raises(ConfigError, match="must be PNG or JPEG"):
        data_url(b"BM bitmap")


def test_the_key_goes_to_the_server_that_it_is_named_for_and_no_other(server, chat, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("OTHER_API_KEY", "sk-other")
    replies(chat(), Request("a"))
    replies(chat(api_key_env="OTHER_API_KEY"), Request("b"))
    assert [h["authorization"] for h in server.headers] == ["Bearer none", "Bearer sk-other"]
    assert not any("sk-secret" in json.dumps(h) for h in server.headers)
    third = chat(api_key_env="THIRD_API_KEY")
    with pytest.raises(ConfigError, match="variable THIRD_API_KEY is not set"):
        replies(third, Request("c"))
    assert replies(third, Request("a"))[0].text == "A"  # what is kept needs no key
    for wrong, message in (
        ({"api_key_env": "AWS_SECRET_ACCESS_KEY"}, "pattern"),
        ({"api_key_env": "MY_API_KEY", "url": "http://example.org/v1"}, "would travel unencrypted to example.org"),
        ({"url": "ftp://example.org"}, "must look like"),
        ({"url": "https://user:word@example.org/v1"}, "no user, password or query"),
        ({"concurrency": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ServerSettings.model_validate({"url": server.url} | wrong)


def test_replies_are_cut_at_stop_texts_and_log_probs_are_checked(server, chat) -> None:
    tokens = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}]}
    server.answer = lambda _: said(" five ###\nQuestion: more", logprobs=tokens)
    assert replies(chat(log_probs=True), Request("q", stop=("###",), log_probs=True))[0].text == "five"
    assert replies(chat(log_probs=True), Request("r", log_probs=True))[0].log_probs == (-0.5, -1.5)
    server.answer = lambda _: said("one two", finish_reason="length")
    assert replies(chat(), Request("s"))[0].cut
    assert not replies(chat(), Request("s", stop=(" two",)))[0].cut
    server.answer = lambda _: said("\n Paris\nQuestion:")
    assert replies(chat(), Request("u", stop=("\n",)))[0].text == "Paris"
    server.answer = lambda _: said("half \ud83d of a pair")
    assert replies(chat(), Request("v"))[0].text == "half ? of a pair"
    for i, wrong in enumerate(([{"logprob": 2.0}], [{"logprob": "x"}], [], None, [{"logprob": float("-inf")}])):
        server.answer = lambda _, wrong=wrong: said("x", logprobs={"content": wrong})
        assert replies(chat(log_probs=True), Request(f"w{i}", log_probs=True))[0].log_probs is None


def test_what_may_pass_is_tried_again_as_the_server_says(server, chat) -> None:
    left = [(429, {"error": {"message": "slow down"}}, {"retry-after": "1"}), (500, b"oops", {}), said("there")]
    server.answer = lambda _: left.pop(0)
    start = time.monotonic()
    assert replies(chat(retries=3), Request("q"))[0].text == "there"
    assert time.monotonic() - start >= 1
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "told", "kind"),
    [
        (500, b"oops", "server"),
        (429, {"error": {"message": "slow down"}}, "server"),
        (400, {"error": {"message": "too long", "code": "context_length_exceeded"}}, "request"),
        (400, {"error": {"message": "no", "code": "content_filter"}}, "refused"),
        (200, {"choices": []}, "reply"),
        (200, {"choices": None}, "reply"),
        (200, b"[1, 2", "reply"),
        (200, b'"text"', "reply"),
        said(None)[:2] + ("reply",),
        said(["a"])[:2] + ("reply",),
        said("", finish_reason="content_filter")[:2] + ("refused",),
        said(None, message={"content": None, "refusal": "I will not"})[:2] + ("refused",),
    ],
)
def test_a_request_that_fails_is_told_and_the_others_go_on(server, chat, status, told, kind) -> None:
    fine = server.answer
    server.answer = lambda body: (status, told, {}) if "bad" in json.dumps(body) else fine(body)
    found = replies(chat(), Request("a"), Request("bad"), Request("c"))
    assert [reply.text for reply in found] == ["A", "", "C"]
    assert found[1].error_kind == kind
    assert found[1].error
    server.answer = fine
    assert replies(chat(), Request("bad"))[0].text == "BAD"  # what failed is not kept


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, {"error": {"message": "wrong key"}}),
        (403, {"error": {"message": "not yours"}}),
        (404, {"error": {"message": "no such model"}}),
        (402, {"error": {"message": "no credit"}}),
        (429, {"error": {"message": "no credit", "code": "insufficient_quota"}}),
    ],
)
def test_what_would_fail_every_request_stops_at_the_first(server, chat, status, told) -> None:
    server.answer = lambda _: (status, told, {})
    with pytest.raises(ModelError, match=f"HTTP {status}: .*{told['error']['message']}"):
        replies(chat(), *(Request(str(i)) for i in range(50)))
    assert len(server.asked) == 1


def test_after_many_failures_in_a_row_nothing_more_is_asked_and_what_came_is_kept(server, chat) -> None:
    fine = server.answer
    server.answer = lambda body: fine(body) if "good" in json.dumps(body) else (500, b"down", {})
    with pytest.raises(ModelError, match=f"{GIVE_UP} requests in a row failed, the last with: HTTP 500"):
        replies(chat(concurrency=1), Request("good"), *(Request(str(i)) for i in range(50)))
    assert len(server.asked) == GIVE_UP + 1
    server.close()
    assert replies(chat(), Request("good"))[0].text == "GOOD"
    with pytest.raises(ModelError, match="1 request in a row failed, the last with: no connection"):
        replies(chat(), Request("other"))


def test_as_many_at_once_as_was_said_and_no_faster(server, chat) -> None:
    fine = server.answer

    def slow(body):
        time.sleep(0.2)
        return fine(body)

    server.answer = slow
    replies(chat(concurrency=3), *(Request(str(i)) for i in range(10)))
    assert server.most == 3
    server.answer = fine
    start = time.monotonic()
    replies(chat("paced", requests_per_minute=600), *(Request(str(i)) for i in range(6)))
    assert time.monotonic() - start >= 0.5  # a tenth of a second between two


def test_what_was_replied_is_kept_when_whoever_asks_stops(server, chat) -> None:
    asking = chat(concurrency=2).ask([Request(str(i)) for i in range(10)])
    next(asking)
    asking.close()
    sent = len(server.asked)
    assert sent < 10
    replies(chat(), *(Request(str(i)) for i in range(10)))
    assert len(server.asked) == 10


def test_damaged_and_foreign_files_of_replies(tmp_path) -> None:
    kept = KeptReplies(tmp_path)
    reply = Reply("a", log_probs=(-1.0,), prompt_tokens=3)
    kept.put("k", reply)
    assert KeptReplies(tmp_path).get("k") == reply
    assert kept.get("none") is None
    base = sqlite3.connect(tmp_path / FILE)
    for spoiled in ("[1]", "{}", "nonsense", '{"text": 3}', json.dumps({"text": "a", "log_probs": [5.0]}), b"\xff"):
        base.execute("insert or replace into replies values ('k', ?)", (spoiled,))
        base.commit()
        assert kept.get("k") is None
    base.close()
    kept.close()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FILE).write_bytes(b"this is no database at all" * 100)
    with pytest.raises(OutputError, match="move it away"):
        KeptReplies(tmp_path / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="kept replies"):
        KeptReplies(tmp_path / "file")
