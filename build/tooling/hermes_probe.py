"""What Hermes Agent finds out about the server at URL, by its own functions. Needs hermes-agent.

python build/tooling/hermes_probe.py URL MODEL HOME    prints one JSON object as its last line
"""

from __future__ import annotations

import json
import os
import sys

url, model, home = sys.argv[1:]
os.environ["HERMES_HOME"] = home  # its settings and caches; read when it is imported

import httpx  # noqa: E402
from agent import model_metadata as metadata  # noqa: E402
from run_agent import AIAgent  # noqa: E402


def refusal(content: str, **more: int) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": content}], **more}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    return answer.text


found = metadata.get_model_context_length(model, base_url=url)
too_long, too_many = refusal("word " * found), refusal("hello", max_tokens=found)
# Refuses, when it is made, a server of less than its minimum.
agent = AIAgent(
    base_url=url,
    api_key="none",
    model=model,
    provider="custom",
    max_iterations=1,
    max_tokens=64,
    enabled_toolsets=[],
    quiet_mode=True,
    skip_context_files=True,
    skip_memory=True,
)
turn = agent.run_conversation("Convert to JSON:\nname: Ada\ncity: Lima")
print(
    json.dumps(
        {
            "server_type": metadata.detect_local_server_type(url),
            "context_length": found,
            "minimum": metadata.MINIMUM_CONTEXT_LENGTH,
            "agent_context_length": agent.context_compressor.context_length,
            "limit_in_error": metadata.parse_context_limit_from_error(too_long),
            "room_in_error": metadata.parse_available_output_tokens_from_error(too_many),
            "api_calls": turn["api_calls"],
            "answered": bool(turn["final_response"]),
            "failed": turn["failed"],
        }
    )
)
