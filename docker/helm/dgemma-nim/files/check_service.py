"""What the pods of `helm test` run: check_service.py health|completion URL [MODEL]. Needs nothing but Python."""

import json
import os
import ssl
import sys
import urllib.request


def ask(url, body=None):
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("API_KEY"):
        headers["Authorization"] = "Bearer " + key
    unverified = ssl._create_unverified_context()  # the service's name need not be the certificate's
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120, context=unverified) as answer:
        return json.load(answer)


def health(url):
    for path in ("/v1/health/live", "/v1/health/ready"):
        print(path, ask(url + path))


def completion(url, names=""):
    served = [model["id"] for model in ask(url + "/v1/models")["data"]]
    model = names.split(",")[0].strip() or served[0]
    if model not in served:
        sys.exit(f"model.name is {model!r}; served are {served}")
    messages = [{"role": "user", "content": "Convert to JSON:\nname: Ada\ncity: Lima"}]
    answer = ask(url + "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 64, "seed": 1})
    print(json.dumps(answer))
    if not answer["choices"][0]["message"]["content"]:
        sys.exit("the answer is empty")


{"health": health, "completion": completion}[sys.argv[1]](*sys.argv[2:])
