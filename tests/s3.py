"""An S3 server on this machine, moto's, that can be told to refuse requests for a while."""

import logging
import os
import threading
from contextlib import contextmanager

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",  # nobody asks for a node's role here
}


class Throttle:
    """A WSGI application in front of another that answers the next `num_refused` requests with 503."""

    def __init__(self, application):
        self.application = application
        self.num_refused = 0
        self.refusals = {}  # by the end of an object's name, whether it is there or not: the status and the code
        self.num_requests = 0
        self.last_authorization = ""

    def __call__(self, environ, start_response):
        self.num_requests += 1
        self.last_authorization = environ.get("HTTP_AUTHORIZATION", "")
        if self.num_refused > 0:
            self.num_refused -= 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        for end, (status, code) in self.refusals.items():
            if environ["PATH_INFO"].endswith(end):
                start_response(f"{status} {code}", [("Content-Type", "application/xml")])
                return [f"<Error><Code>{code}</Code><Message>No.</Message></Error>".encode()]
        return self.application(environ, start_response)


@contextmanager
def s3_server(host="127.0.0.1"):
    """Serve a bucket called `bucket`; yields the server's throttle and the query that leads a URI to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
    throttle = Throttle(DomainDispatcherApplication(create_backend_app))
    server = make_server(host, 0, throttle, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"{host}:{server.port}"
    try:
        client(endpoint).create_bucket(Bucket="bucket")
        yield throttle, f"?region=us-east-1&scheme=http&endpoint_override={endpoint}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def client(endpoint):
    """A client of another library, to look at the bucket with."""
    return boto3.client(
        "s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1", aws_access_key_id="key",
        aws_secret_access_key="secret",
    )  # fmt: skip


def put_folder(query, folder, prefix):
    """Copy a folder's files into the bucket."""
    s3 = client(query.rpartition("=")[2])
    for path in folder.rglob("*"):
        if path.is_file():
            s3.put_object(Bucket="bucket", Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())


def object_names(query, prefix):
    """List the bucket's objects below a prefix, markers of folders left out."""
    listed = client(query.rpartition("=")[2]).list_objects_v2(Bucket="bucket", Prefix=prefix)
    return sorted(item["Key"] for item in listed.get("Contents", []) if not item["Key"].endswith("/"))


def read_object(query, name):
    """Read an object of the bucket."""
    return client(query.rpartition("=")[2]).get_object(Bucket="bucket", Key=name)["Body"].read()


def set_credentials(monkeypatch):
    """Give this process, and what it starts, the server's credentials and no others."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
