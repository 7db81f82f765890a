"""Counts visits in the cache, writes each into the database, and greets with a file of the host's."""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psycopg2
import redis

DATABASE = psycopg2.connect(os.environ["DATABASE"])
DATABASE.autocommit = True
CACHE = redis.Redis(host=os.environ["CACHE"])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/health":
            answer = {}
        else:
            with DATABASE.cursor() as cursor:
                cursor.execute("INSERT INTO visits DEFAULT VALUES")
                cursor.execute("SELECT count(*) FROM visits")
                written = cursor.fetchone()[0]
            with open("/static/greeting") as file:
                greeting = file.read()
            answer = {"counted": CACHE.incr("visits"), "written": written, "greeting": greeting}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


with DATABASE.cursor() as cursor:
    cursor.execute("CREATE TABLE IF NOT EXISTS visits (id serial, at timestamptz DEFAULT now())")
ThreadingHTTPServer(("", 8000), Handler).serve_forever()
