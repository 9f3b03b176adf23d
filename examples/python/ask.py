"""Ask about a picture and print the answer while it is written:
`python ask.py bundles/shapes-vlm picture.png "what color is the circle?"`.

With `--address HOST:PORT` the first argument is the name of a model on that server.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import enginecast


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask about a picture.")
    parser.add_argument("model", help="folder of a bundle, or with --address the name of a model")
    parser.add_argument("picture", type=Path)
    parser.add_argument("question")
    parser.add_argument("--address", help="server to use, HOST:PORT")
    options = parser.parse_args()
    session: enginecast.Model | enginecast.Client = (
        enginecast.Client(options.address, options.model) if options.address else enginecast.load(options.model)
    )
    with session, session.chat_stream(options.question, [options.picture]) as stream:
        for event in stream:
            if isinstance(event, enginecast.TextDelta):
                print(event.text, end="", flush=True)
        answer = stream.result()
    print(f"\n({answer.completion_tokens} tokens in {answer.done.run_seconds:.1f} s)")


if __name__ == "__main__":
    main()
