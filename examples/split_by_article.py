"""Split a file of questions in SQuAD's format by article: no text of the training part stands in the test part.

    python examples/split_by_article.py dev-v2.0.json --out data/squad2 --test 0.2

writes OUT/train.json and OUT/test.json. Articles are shuffled by the hash of their titles, so that everybody gets the
same split; the test part takes articles until it has its share of the questions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any


def questions(article: dict[str, Any]) -> int:
    return sum(len(paragraph["qas"]) for paragraph in article["paragraphs"])


def split(articles: list[dict[str, Any]], share: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training articles, test articles)."""
    total = sum(map(questions, articles))
    order = sorted(articles, key=lambda article: hashlib.sha256(article["title"].encode("utf-8")).hexdigest())
    train: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    for article in order:
        (test if sum(map(questions, test)) < share * total else train).append(article)
    return train, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a file in SQuAD's format")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--test", type=float, default=0.2, help="share of the questions that are tested")
    arguments = parser.parse_args()
    content = json.loads(arguments.source.read_text(encoding="utf-8"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "test"), split(content["data"], arguments.test), strict=True):
        text = json.dumps({"version": content.get("version", ""), "data": part}, ensure_ascii=False)
        (arguments.out / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}: {len(part)} articles, {sum(map(questions, part)):,} questions")


if __name__ == "__main__":
    main()
