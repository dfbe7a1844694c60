"""Chat with a server through the openai SDK: streaming, then an answer as JSON.

pip install openai
python examples/openai_chat.py [--url http://127.0.0.1:30000]
"""

from __future__ import annotations

import argparse

import openai
from pydantic import BaseModel


class City(BaseModel):
    """What the second question is answered with."""

    name: str
    country: str


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat through the openai SDK.")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--api-key", default="none")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.url + "/v1", api_key=args.api_key)
    model = client.models.list().data[0].id

    question = "What is the capital of France?"
    print(f"> {question}")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=64,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)

    question = "Name a city in Italy, as JSON."
    print(f"\n\n> {question}")
    reply = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": question}],
        response_format=City,
        max_tokens=64,
        temperature=0,
    )
    print(reply.choices[0].message.parsed)


if __name__ == "__main__":
    main()
