import re
import shutil
from pathlib import Path

from effir_search.indexing.build import index_corpus

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def test_the_page_of_adapters_runs(tmp_path, monkeypatch, bert_folder, collection):
    shutil.copytree(bert_folder, tmp_path / "model")
    shutil.copytree(collection, tmp_path / "collection")
    monkeypatch.chdir(tmp_path)
    index_corpus("collection/corpus.jsonl", "model", Path("indexes/toy"))
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"docs/adapters.md, block {number}", "exec"), names)
    assert names["model"].mteb_model_meta.embed_dim == 16
    assert list(names["scores"]) == ["collection"]
    assert len(names["pipeline"](names["topics"])) == 30
    experiments = [path.parent.name for path in Path("runs/mteb").rglob("collection.json")]
    assert any("kind_SQ8" in name for name in experiments)
