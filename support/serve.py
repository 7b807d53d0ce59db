"""The local web server behind --serve."""

import contextlib
import functools
import ipaddress
import json
import secrets
import socket
import sys
import threading
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from support.canvases import EditCanvas, TranslationCanvas, colours_of
from support.errors import UserError
from support.limits import Limits, values_of
from support.studio import Studio

MOST_BYTES = 2**26  # of a request
ENDED = threading.Event()


def translations(cfg, predict, net, from_labels, to_labels):
    """--serve of a script that translates; the arguments are translate_files'."""
    limits = Limits.of(cfg, cfg.domains[1])

    def show(strip):
        if to_labels:
            return cfg.classes.palette[strip.argmax(0)]
        return colours_of(values_of(strip, limits), limits)

    make = functools.partial(TranslationCanvas, cfg, until_the_end(predict), net, show)
    serve(Studio(cfg, cfg.classes if from_labels else None, make))


def edits(cfg, predict, net):
    """--serve of a script that edits photographs; the arguments are edit_file's."""
    make = functools.partial(EditCanvas, cfg, until_the_end(predict), net)
    serve(Studio(cfg, cfg.classes, make, edits=True))


def until_the_end(predict):
    """A predict that raises Refused once the server has ended."""

    def predicting(*windows, **how):
        if ENDED.is_set():
            raise Refused(503, "the server has ended")
        return predict(*windows, **how)

    return predicting


def serve(studio):
    """Answers requests until Ctrl-C or SIGTERM."""
    ENDED.clear()  # of an earlier page of this process, as in a notebook
    with listening(studio) as server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    ENDED.set()
    studio.worker.shutdown(wait=False, cancel_futures=True)
    for thread in threading.enumerate():  # PyTorch aborts if Python ends while one frees tensors
        if hasattr(thread, "connection"):
            with contextlib.suppress(OSError):
                thread.connection.shutdown(socket.SHUT_RD)  # its client may be slow
            thread.join(5)
    print("ended")


def listening(studio):
    """A Server on --address and --port, whose address is printed."""
    asked = f"--address {studio.cfg.address} --port {studio.cfg.port}"
    try:
        server = Server(studio)
    except OSError as error:
        reason = f"cannot listen there ({error.strerror}): choose others; --port 0 finds a free one"
        raise UserError(f"{asked}: {reason}") from None
    host, port = server.server_address[:2]
    if not ipaddress.ip_address(host).is_loopback:
        print(f"warning: {asked}: anyone with the address below can use it", file=sys.stderr)
        server.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    host = f"[{host}]" if ":" in host else host
    print(f"paint at http://{host}:{port}/{server.token}/ (Ctrl-C ends it)", flush=True)
    return server


class Server(ThreadingHTTPServer):
    """The local server, with a thread for each connection."""

    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # where two servers would share a port

    def __init__(self, studio):
        address = studio.cfg.address
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.studio, self.token = studio, secrets.token_urlsafe(24)
        self.names = {address.lower(), "localhost"}
        super().__init__((address, studio.cfg.port), Handler)

    def handle_error(self, *about):
        """Prints the traceback of a bug of ours; a client that goes away is none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*about)


class Handler(BaseHTTPRequestHandler):
    """One request. Its errors are plain text, which the page shows."""

    server_version, sys_version = "paint", ""
    timeout = 5  # seconds without a byte, until a token was seen
    headers_of_all = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'; "
        "base-uri 'none'; form-action 'none'",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }

    def do_GET(self):
        """Answers a request, also by POST."""
        threading.current_thread().connection = self.connection  # until the answer is sent
        try:
            address = urlsplit(self.path)
            _, token, *name = address.path.split("/", 2)
            self._check(token)
            if name:
                content = self._content(name[0], dict(parse_qsl(address.query)))
                self._send(200, *content)
            else:  # the last slash is missing
                self._send(301, "text/plain", b"", Location=f"/{token}/")
        except UserError as error:
            status = getattr(error, "status", 400)
            self._send(status, "text/plain", str(error).encode(errors="replace"))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self._send(400, "text/plain", f"not understood: {error!r}"[:200].encode())
        except (ConnectionError, TimeoutError, CancelledError):
            pass  # the page is gone, or the server ends
        except Exception as error:  # a bug of ours: the page shows it, too
            self._send(500, "text/plain", repr(error)[:300].encode())
            raise

    do_POST = do_GET

    def _content(self, name, query):
        """The answer to a name: the kind of content, and its bytes."""
        studio, wanted = self.server.studio, (self.command, name)
        if wanted == ("GET", ""):
            return "text/html; charset=utf-8", studio.page().encode()
        if wanted == ("POST", "labels.png"):
            return "image/png", studio.file_of(query, self._body())
        if wanted == ("POST", "open"):
            answer = studio.open(json.loads(self._body()))
        elif wanted == ("POST", "stroke"):
            answer = studio.stroke(query, self._body())
        else:
            raise Refused(404, "there is nothing of that name")
        return "application/json", json.dumps(answer).encode()

    def _body(self):
        length = int(self.headers.get("Content-Length", -1))
        if not 0 <= length <= MOST_BYTES:
            raise Refused(413, "too large: files may have 45 MB together")
        return self.rfile.read(length)

    def _check(self, token):
        """Refuses a request that is not the page's, by its host, its origin and its token."""
        host, origin = self.headers.get("Host", "").lower(), self.headers.get("Origin")
        names = {*self.server.names, self.connection.getsockname()[0]}
        if urlsplit(f"//{host}").hostname not in names or origin not in (None, f"http://{host}"):
            raise Refused(403, "asked for by another name, or from another page")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "incomplete or old address: open the one that --serve printed last")
        self.connection.settimeout(60)

    def _send(self, status, kind, content, **more):
        with contextlib.suppress(ConnectionError):  # the page is gone
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(content))}
            for name, value in (headers | more | self.headers_of_all).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_):
        """Logs nothing: every line would have the token."""


class Refused(UserError):
    """A request that is not the page's, with an HTTP status."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status
