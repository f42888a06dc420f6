"""Every setting of every job, written once: its name, type, range, default and help.

A job's settings are a frozen dataclass. Its fields are made into the options of the command (``cli.options``), into the
check of a recipe (``compression.recipe``) and into the record that a job leaves, so that a setting is added here alone.
A field's type says what it may be: ``Literal`` lists the choices, ``Annotated`` the range. Nothing heavy is imported.
The file is long because it is one list, to be read a class at a time.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from annotated_types import Ge, Gt, Le, Lt

from effir_search.errors import UserError

Count = Annotated[int, Ge(1)]
CountFrom0 = Annotated[int, Ge(0)]
Weight = Annotated[float, Ge(0)]
AboveZero = Annotated[float, Gt(0)]
# 0 to 1, both included.
Share = Annotated[float, Ge(0), Le(1)]
# 0 to 1, but less than all.
PartialShare = Annotated[float, Ge(0), Lt(1)]

Pooling = Literal["cls", "last", "mean", "max", "weightedmean", "mean_sqrt_len_tokens"]
Dtype = Literal["auto", "saved", "fp32", "bf16", "fp16"]
Backend = Literal["auto", "torch", "onnx", "openvino"]
ExportFormat = Literal["onnx", "openvino", "gguf", "flex"]
GgufWeights = Literal["f32", "f16", "bf16", "q8_0"]
WeightDtype = Literal["fp32", "bf16", "fp16"]
Criterion = Literal["cosine", "embedding", "greedy"]
UnitCriterion = Literal["gates", "activation", "taylor", "magnitude", "random"]
PartKind = Literal["attention", "mlp", "block"]
StudyTable = Literal["kinds", "shape", "parts", "units", "native"]
Schedule = Literal["linear", "cosine", "constant"]
Reporter = Literal["tensorboard", "wandb"]
Distilled = Literal["candidates", "batch"]
TopicField = Literal["title", "description", "narrative"]
NegativeSample = Literal["random", "top"]
Feedback = Literal["average", "rocchio"]
HybridFusion = Literal["rrf", "interpolation"]
FusionMethod = Literal["rrf", "interpolation", "average"]
Normalization = Literal["min-max", "z-score", "none"]
MissingScore = Literal["lowest", "zero"]
ReportFormat = Literal["text", "json", "csv", "markdown"]
ComparisonFormat = Literal["text", "json", "csv", "markdown", "latex"]
DescriptionFormat = Literal["text", "json"]

# Texts that importance is measured on.
NUM_TEXTS = 256


def choices(kind: object) -> tuple[str, ...]:
    """Return the names of a choice, in order: those of a ``Literal``."""
    return get_args(kind)


def pooling_modes(pooling: str) -> list[str]:
    """Return the names of ``Pooling`` in a pooling, which is one of them or several, as in "cls+mean".

    Raises:
        ValueError: Any other.
    """
    modes = pooling.split("+")
    known = choices(Pooling)
    if any(mode not in known for mode in modes):
        raise UserError(f"pooling {pooling!r} is unknown; known are {', '.join(known)}, or several, as in cls+mean")
    return modes


def setting(
    default: object = ..., *, help: str, default_text: str | None = None, option: str | None = None, only: str = ""
) -> Any:  # noqa: ANN401, a dataclass field stands for a value of any type
    """Return a field of a settings dataclass.

    Args:
        default: Its default; without one it must be given.
        help: One sentence: what it is.
        default_text: What None, or the absence of a value, stands for.
        option: The command's option, where it is not the field's name with hyphens.
        only: With which other setting it has an effect; a prefix of the help.
    """
    metadata = {"help": f"{only}: {help}" if only else help, "default_text": default_text, "option": option}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


class Settings:
    """What the dataclasses below share."""

    # For pydantic, which checks recipes: no field takes an infinity or a NaN.
    __pydantic_config__: ClassVar[dict[str, bool]] = {"allow_inf_nan": False}

    def with_defaults(self, **defaults: object) -> Self:
        """Return these settings with other values for the fields that are None."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def given(self) -> dict[str, object]:
        """Return the fields that ask for something, by name: those that are neither None nor a flag that is off."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    def as_options(self, *, without: Collection[str] = ()) -> list[str]:
        """Return these settings as options of a command, those that have their defaults left out."""
        words: list[str] = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in without or value == f.default or value is None:
                continue
            name = f.metadata["option"] or f"--{f.name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(name if value else f"--no-{name.removeprefix('--')}")
            elif f.name in ("dimensions", "log_to"):
                words += [name, ",".join(map(str, value))]
            else:
                values = value if isinstance(value, tuple) else (value,)
                words += [word for one in values for word in (name, str(one))]
        return words


MODELS = "the model's"
STOCK = "Instead of a model's own code, which is never run, take transformers' stock model; vectors may be others."


@dataclass(frozen=True)
class TextSettings(Settings):
    """How a text becomes one vector, where that is not to be what the model's own files say.

    Attributes:
        pooling: A key of ``pooling.POOLERS``.
        query_prompt: Put before every query.
        document_prompt: Put before every document.
        append_eos: End every text with the EOS token, also a truncated one.
        normalize: Let vectors have length 1 and be compared by the cosine.
    """

    pooling: Pooling | None = setting(None, help="Token states to one vector.", default_text=MODELS)
    query_prompt: str | None = setting(None, help="Text before every query.", default_text=MODELS)
    document_prompt: str | None = setting(None, help="Text before every document.", default_text=MODELS)
    append_eos: bool = setting(False, help="End every text with the EOS token.", default_text=MODELS)
    normalize: bool = setting(False, help="Vectors of length 1, compared by the cosine.", default_text=MODELS)


@dataclass(frozen=True)
class EncoderOptions(TextSettings):
    """How a model is loaded and run, from the command to ``Encoder.from_pretrained``.

    Attributes:
        max_length: Tokens of a text that are read, special tokens included.
        dimension: Leading components of a vector that are kept, for models trained so (Matryoshka).
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU if there is one, under a launcher each process its own.
        dtype: Of the transformer's arithmetic; "auto" is bf16 where the processor computes in it, fp32 elsewhere;
            "saved" is that of the weights; None = whatever the job at hand takes by itself.
        batch_tokens: Upper bound of rows times longest row in a forward pass.
        backend: What computes, on a CPU: a key of ``model.graph_model.GRAPH_FILES`` or "torch"; "auto" lets an index
            job measure which is fastest.
        stock_architecture: Take transformers' stock model of a folder that has code of its own, which is never run.
    """

    max_length: Count | None = setting(None, help="Tokens of a text read.", default_text=MODELS)
    dimension: Count | None = setting(None, help="Leading components of a vector to keep.", default_text="all")
    device: str = setting("auto", help="auto, cpu, cuda, cuda:1, ...")
    dtype: Dtype | None = setting(
        None,
        help="Arithmetic; auto is bf16 where the processor has it.",
        default_text="auto; in a search, the index's",
    )
    batch_tokens: Count | None = setting(None, help="Padded tokens a forward pass.", default_text="by device")
    backend: Backend | None = setting(
        None,
        help="What computes on a CPU; auto is the fastest while indexing.",
        default_text="torch, or an exported model's; in a search, the index's",
    )
    stock_architecture: bool = setting(False, help=STOCK)


@dataclass(frozen=True)
class IndexSettings(Settings):
    """How a corpus is read and made an index.

    Attributes:
        kind: FAISS factory string, see ``faiss_kinds``.
        train_size: Vectors that an approximate kind is trained on.
        overwrite: Replace an existing index, once the new one is complete.
        fields: JSON fields whose texts, joined by one space, are a document's text.
        id_field: JSON field that is a document's id.
        skip_bad: Leave out bad lines, with a warning for each.
        restart: Discard what an earlier job left in the store.
        repair: Encode again what is damaged or missing in the store, instead of raising.
        keep_embeddings: Keep the store, now and whenever an index is built from it.
        threads: Of torch, in each process; None = those of the job that is continued, or all cores, shared.
    """

    kind: str = setting("Flat", help="FAISS factory string: Flat, SQ8, HNSW32, IVF4096,PQ64, ...")
    train_size: Count | None = setting(None, help="Vectors an approximate kind is trained on.", default_text="by kind")
    overwrite: bool = setting(False, help="Replace an existing index, once the new one is complete.")
    fields: tuple[str, ...] = setting(
        (), help="JSON fields that are the text, as in title,abstract.", default_text="contents, or title,text"
    )
    id_field: str | None = setting(None, help="JSON field that is the id.", default_text="_id, id, pid, docid, ...")
    skip_bad: bool = setting(False, help="Leave out bad lines and list them, instead of stopping at the first.")
    restart: bool = setting(False, help="Discard what a stopped job left, instead of continuing it.")
    repair: bool = setting(False, help="Encode again what is damaged or missing in OUTPUT.parts.")
    keep_embeddings: bool = setting(False, help="Keep OUTPUT.parts, the vectors; later jobs keep them too.")
    threads: Count | None = setting(None, help="Threads of each process.", default_text="all cores, shared")


@dataclass(frozen=True)
class SearchSettings(Settings):
    """How an index is searched.

    Attributes:
        hits: Hits a query, at most; None = 1000, or 10 for a single text.
        remove_query: Leave out the document whose id is the query's, and find one more in its place.
        threads: Of FAISS; None = one for each core this process may use.
        ef_search: Candidates that a search of an HNSW keeps, see ``faiss_kinds.set_search_parameters``.
        nprobe: Lists of an IVF that are searched, likewise.
    """

    hits: Count | None = setting(None, help="Hits a query.", default_text="1000; with --query, 10")
    remove_query: bool = setting(False, help="Drop the document whose id is the query's.")
    threads: Count | None = setting(None, help="Threads of FAISS.", default_text="all cores")
    ef_search: Count | None = setting(None, help="Candidates an HNSW keeps.", default_text="128, or the hits")
    nprobe: Count | None = setting(None, help="Lists of an IVF that are searched.", default_text="a sixteenth")


@dataclass(frozen=True)
class FeedbackSettings(Settings):
    """Vector pseudo-relevance feedback: a second search with a vector made of the query's and of its first hits'.

    Attributes:
        prf: How that vector is made; None = there is no second search. The names and defaults are Pyserini's.
        prf_depth: First hits that are taken.
        rocchio_alpha: Of the query.
        rocchio_beta: Of the mean of the hits that count as relevant.
        rocchio_gamma: Of the mean of those that do not, which is taken away.
        rocchio_topk: How many of the first hits count as relevant; None = all of them.
        rocchio_bottomk: How many of them, the last ones, do not.
    """

    prf: Feedback | None = setting(None, help="Search again, with the first hits' vectors.", default_text="no")
    prf_depth: Count = setting(3, only="--prf", help="first hits to take.")
    rocchio_alpha: Weight = setting(0.9, only="--prf rocchio", help="weight of the query.")
    rocchio_beta: Weight = setting(0.1, only="--prf rocchio", help="weight of relevant hits.")
    rocchio_gamma: Weight = setting(0.1, only="--prf rocchio", help="weight of other hits.")
    rocchio_topk: Count | None = setting(
        None, only="--prf rocchio", help="first hits that are relevant.", default_text="--prf-depth"
    )
    rocchio_bottomk: CountFrom0 = setting(0, only="--prf rocchio", help="last hits that are not.")

    def __post_init__(self) -> None:
        for name in ("rocchio_topk", "rocchio_bottomk"):
            if (getattr(self, name) or 0) > self.prf_depth:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: more than the {self.prf_depth} of --prf-depth"
                )
        if self.rocchio_alpha == 0 == self.rocchio_beta:
            raise UserError("--rocchio-alpha and --rocchio-beta: one of them must be above 0, or no vector is left")


@dataclass(frozen=True)
class Bm25Settings(Settings):
    """How BM25 weighs words; the defaults are Anserini's.

    Attributes:
        k1: How soon more occurrences of a word count no more.
        b: How much a long document loses.
    """

    k1: Weight = setting(0.9, option="--bm25-k1", only="BM25", help="how long repetitions of a word count.")
    b: Share = setting(0.4, option="--bm25-b", only="BM25", help="how much a long document loses.")


@dataclass(frozen=True)
class FusionSettings(Settings):
    """How the lists of hits of a query become one; see ``searching.fuse``.

    Attributes:
        rrf_k: Constant of reciprocal rank fusion.
        normalization: How scores of a list are made comparable, where scores are added.
        missing: What a document has in a list that lacks it, where scores are added.
        depth: Hits of each list that count.
    """

    rrf_k: CountFrom0 = setting(60, only="rrf", help="constant that is added to a rank.")
    normalization: Normalization = setting("min-max", only="Scores", help="how a list's are made comparable.")
    missing: MissingScore = setting("lowest", only="Scores", help="that of a document in a list without it.")
    depth: Count = setting(1000, help="Hits of each list that count.")


@dataclass(frozen=True)
class HybridSettings(FusionSettings):
    """How a dense list and BM25's become one.

    Attributes:
        fusion: What is added up.
        weight: Of the dense list, the other has the rest; None = one half.
    """

    fusion: HybridFusion = setting("rrf", help="Add up reciprocal ranks, or scores.")
    weight: Share | None = setting(
        None, only="--fusion interpolation", help="of the dense list; BM25 has the rest.", default_text="0.5"
    )

    def __post_init__(self) -> None:
        if self.weight is not None and self.fusion != "interpolation":
            raise UserError("--weight goes with --fusion interpolation")


@dataclass(frozen=True)
class TuningSettings(Settings):
    """On which queries a hybrid search is tuned.

    Attributes:
        tune: Judgments of dev queries; None = nothing is tuned.
        tune_topics: Where these queries are; None = among the topics.
    """

    tune: str | None = setting(None, help="Qrels of other queries: choose weight and normalisation on them.")
    tune_topics: str | None = setting(None, only="--tune", help="topics of these.", default_text="--topics")


@dataclass(frozen=True)
class FuseSettings(FusionSettings):
    """How runs become one.

    Attributes:
        method: What is added up: reciprocal ranks, or scores by weights or all alike.
        weights: Of each run; empty = all alike.
        hits: Hits a query.
    """

    method: FusionMethod = setting("rrf", help="Add up reciprocal ranks, weighted scores, or take scores' mean.")
    weights: tuple[Weight, ...] = setting((), help="Weight of each run, as in 0.7,0.3.", default_text="all alike")
    hits: Count = setting(1000, help="Hits a query.")

    def __post_init__(self) -> None:
        if self.weights and self.method == "average":
            raise UserError("--weights goes with --method rrf or interpolation; an average weighs all runs alike")
        if self.weights and not any(self.weights):
            raise UserError("--weights: one of them must be above 0")


@dataclass(frozen=True)
class ServeSettings(Settings):
    """Where a server listens, and what it lets a request ask for.

    Attributes:
        host: Address; 0.0.0.0 is all of this machine's.
        port: Of TCP; 0 = one that is free.
        server_name: Names that requests may call the server by, beside addresses, localhost and ``host``.
        api_key_file: File with the key that requests need; None = the one in EFFIR_API_KEY, or none.
        max_hits: Hits that a request may ask for.
        max_inputs: Texts that a request for embeddings may have.
        max_query_length: Characters of a query.
        max_body: Bytes of a request's body.
        max_requests: Requests that are answered at the same time.
        timeout: Seconds that a request may take.
    """

    host: str = setting("127.0.0.1", help="Address to listen on.")
    port: Annotated[int, Ge(0), Le(65535)] = setting(8081, help="Port to listen on; 0 is a free one.")
    server_name: tuple[str, ...] = setting((), help="Host name that requests may use, as behind a proxy.")
    api_key_file: str | None = setting(
        None, help="File with the key that requests need.", default_text="the one in EFFIR_API_KEY, or none"
    )
    max_hits: Count = setting(1000, help="Hits that a request may ask for.")
    max_inputs: Count = setting(128, help="Texts that a request for embeddings may have.")
    max_query_length: Count = setting(4096, help="Characters that a query may have.")
    max_body: Count = setting(2_000_000, help="Bytes that a request's body may have.")
    max_requests: Count = setting(256, help="Requests that are answered at the same time.")
    timeout: AboveZero = setting(30.0, help="Seconds that a request may take.")


@dataclass(frozen=True)
class PlanSettings(Settings):
    """What a model would lose, on paper.

    Attributes:
        drop_mlp: MLPs.
        drop_attention: Attentions.
        drop_block: Whole layers, which go before the other two.
        narrow: Share of the units of every MLP left.
    """

    drop_mlp: CountFrom0 | None = setting(None, only="Plan", help="so many MLPs less.")
    drop_attention: CountFrom0 | None = setting(None, only="Plan", help="so many attentions less.")
    drop_block: CountFrom0 | None = setting(None, only="Plan", help="so many whole layers less.")
    narrow: PartialShare | None = setting(None, only="Plan", help="this share of the MLP units left less.")


@dataclass(frozen=True)
class MiningSettings(Settings):
    """Which hits of a run become hard negatives.

    Attributes:
        first: Rank of the first candidate, from 1.
        last: Rank of the last candidate.
        negatives: At most so many a query.
        margin: Leave out candidates whose score in the run is above that of the query's lowest positive less this.
            Where the run has no positive of the query, nothing is left out.
        teacher: A bi-encoder: leave out candidates whose score it puts above a share of that of the query's lowest
            positive, and write its scores.
        reranker: The same with a cross-encoder.
        teacher_ratio: That share. Where the positive's score p is negative, the bound is p - (1 - share) |p|, which is
            the same for a score above 0.
        sample: Which of the candidates are taken.
        seed: Of a random sample; what a query gets does not depend on other queries.
        device: Of the teacher.
        stock_architecture: See ``EncoderOptions``, for the teacher.
    """

    first: Count = setting(1, help="Rank of the first candidate.")
    last: Count = setting(100, help="Rank of the last candidate.")
    negatives: Count = setting(8, help="Take at most so many a query.")
    margin: float | None = setting(None, help="Leave out hits above the lowest positive's score in the run less this.")
    teacher: str | None = setting(None, help="Bi-encoder that scores the documents; folder or hub name.")
    reranker: str | None = setting(None, help="Instead of it: cross-encoder; folder or hub name.")
    teacher_ratio: Annotated[float, Gt(0), Le(1)] = setting(
        0.95, help="Leave out hits whose teacher's score is above this share of the lowest positive's."
    )
    sample: NegativeSample = setting("random", help="Which of the candidates to take.")
    seed: CountFrom0 = setting(0, help="Seed of a random sample.")
    device: str = setting("auto", help="Of the teacher: auto, cpu, cuda, cuda:1, ...")
    stock_architecture: bool = setting(False, help=STOCK)


@dataclass(frozen=True)
class DataSettings(Settings):
    """What is learned from, and what is measured on meanwhile.

    Attributes:
        train: Examples, see ``training_records.read_records``; or None, and
        texts: texts to imitate a teacher on, as documents, each as ``texts.read_texts`` takes it,
        queries: and as queries, as ``texts.read_query_texts`` does.
        num_texts: At most so many of them; None = all.
        corpus: For examples that are ids.
        topics: For examples that are ids.
        split: Of a BEIR folder.
        negatives: Hard negatives of an example that are used, the first ones.
        teacher: A bi-encoder: what is imitated, or what scores candidates.
        reranker: A cross-encoder that scores candidates.
        dev: BEIR folder with a split for nDCG@10 while training.
        dev_split: Its name.
        dev_queries: At most so many of its queries.
        dev_documents: In so many of its documents.
        dev_remove_query: Leave out the document whose id is the query's, where its queries are documents.
    """

    train: str | None = setting(
        None, help="Examples: JSONL of query, positives, negatives or of their ids, or a BEIR folder."
    )
    texts: tuple[str, ...] = setting((), only="Without labels", help="corpus or text file to imitate the teacher on.")
    queries: tuple[str, ...] = setting((), help="The same, with the query prompt: topics or text file.")
    num_texts: Count | None = setting(None, help="Take a sample of so many texts.", default_text="all")
    corpus: str | None = setting(None, help="Where the documents are, for examples that are ids.")
    topics: str | None = setting(None, help="Where the queries are, for examples that are ids.")
    split: str = setting("train", help="Qrels of a BEIR folder to train on.")
    negatives: CountFrom0 = setting(7, help="Hard negatives of an example that are used.")
    teacher: str | None = setting(None, help="Encoder to imitate on --texts, or whose scores to learn with --train.")
    reranker: str | None = setting(None, help="Cross-encoder whose scores to learn with --train.")
    dev: str | None = setting(
        None, help="BEIR folder whose nDCG@10 to watch.", default_text="likeness to the teacher, with --texts"
    )
    dev_split: str = setting("dev", help="Its qrels.")
    dev_queries: Count = setting(200, help="Sample of its queries.")
    dev_documents: Count = setting(2000, help="Sample of its documents.")
    dev_remove_query: bool = setting(False, help="There, drop the document whose id is the query's.")

    def __post_init__(self) -> None:
        imitates = bool(self.texts or self.queries)
        if bool(self.train) == imitates:
            raise UserError("give either --train with examples, or --texts (or --queries) and --teacher without labels")
        if imitates and not self.teacher:
            raise UserError("--texts without --teacher: name the model to imitate, such as the one before pruning")
        if self.reranker and (imitates or self.teacher):
            raise UserError("--reranker scores the candidates of --train examples; it does not go with --teacher")
        if imitates and (ignored := [name for name in ("corpus", "topics") if getattr(self, name)]):
            raise UserError(f"--{ignored[0]} goes with --train, not with --texts")
        if self.train and self.num_texts:
            raise UserError("--num-texts goes with --texts; of --train all examples are learned from")
        if self.dev_remove_query and not self.dev:
            raise UserError("--dev-remove-query goes with --dev")


@dataclass(frozen=True)
class LossSettings(Settings):
    """What the losses depend on.

    Attributes:
        temperature: What similarities are divided by; None = 0.02 for cosines, 1 for dot products.
        teacher_temperature: What a teacher's scores are divided by; None = 1, but for a bi-encoder as its student's.
        contrastive_weight: Of InfoNCE with --train; 0 = the teacher's scores are all that is learned.
        distillation_weight: Of the KL divergence from the teacher's scores, beside InfoNCE.
        distill_over: Documents of that divergence: each query's own candidates, whose scores are prepared; or all
            documents of the batch, on whatever device, which a bi-encoder then scores beside the training.
        score_weight: Of the squared difference of score matrices, beside 1 - cosine of embeddings.
        token_weight: Of 1 - cosine of the states of each token, beside that of embeddings; None = 1 for a teacher that
            reads the same tokens into states of the same size, such as the model before pruning, if both pool their
            mean; 0 for others.
        dimensions: The loss is the mean over the leading so many components of the embeddings (Matryoshka,
            arXiv 2205.13147); empty = all components alone.
        cached: Keep no activations between the forward and the backward pass (GradCache, arXiv 2101.06983): a batch
            then needs the memory of one chunk, for the time of one more forward pass.
    """

    temperature: AboveZero | None = setting(None, help="Of InfoNCE and KL.", default_text="0.02; dot products: 1")
    teacher_temperature: AboveZero | None = setting(
        None, help="Of the teacher's scores.", default_text="1; with --teacher: --temperature"
    )
    contrastive_weight: Weight = setting(1.0, only="With --train", help="of InfoNCE.")
    distillation_weight: Weight = setting(1.0, help="Of KL beside InfoNCE.")
    distill_over: Distilled = setting(
        "candidates", help="Documents of KL: a query's own, or, with --train and --teacher, all of the batch."
    )
    score_weight: Weight = setting(10.0, only="With --texts", help="of score matrices beside embeddings.")
    token_weight: Weight | None = setting(
        None,
        only="With --texts",
        help="of each token's state.",
        default_text="1 if the teacher has the same tokens and pools their mean",
    )
    dimensions: tuple[Count, ...] = setting(
        (), option="--matryoshka", help="Train vectors that can be cut: 384,256,128."
    )
    cached: bool = setting(
        False, option="--grad-cache", help="The memory of one forward pass, whatever the batch size."
    )

    def __post_init__(self) -> None:
        if not self.contrastive_weight and not self.distillation_weight:
            raise UserError(
                "--contrastive-weight 0 and --distillation-weight 0 leave nothing to learn; give one of them above 0"
            )


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """How it is learned. The defaults of LoRA are EffiR's.

    Attributes:
        lora_rank: Rank of LoRA on all matrices of attentions and MLPs; 0 = all weights are trained; None = 32 for a
            model of a billion parameters or more, 0 for a smaller one.
        lora_alpha: None = twice the rank.
        lora_dropout: Of LoRA's input.
        learning_rate: None = 1e-4 for LoRA, 2e-5 for full fine-tuning; for imitation 4e-4 for LoRA, and for full
            fine-tuning 0.2 / hidden_size, since rates of Adam scale with 1 / width (arXiv 2203.03466).
        batch_size: Examples or texts of a step, over all devices.
        accumulation: Forward passes whose gradients make a step; in-batch negatives come from one of them.
        epochs: Passes over the data.
        max_steps: At most so many; None = by epochs.
        warmup: Share of the steps in which the rate rises from 0, rounded down.
        schedule: Of the rate after that.
        weight_decay: Of AdamW.
        max_grad_norm: Longer gradients are scaled down to this length.
        bf16: Compute in bfloat16 beside float32 weights; None = where the processor does by itself.
        gradient_checkpointing: Keep only the layers' inputs for the backward pass.
        dropout: As the model's config says; False = none.
        eval_steps: Steps between two measurements and checkpoints; None = a twentieth of all.
        patience: Measurements without a better one after which training ends; None = never.
        seed: Of order, dropout and LoRA's start.
        log_to: Where transformers reports besides the JSON log.
    """

    lora_rank: CountFrom0 | None = setting(
        None, help="Train LoRA matrices only; 0 = all weights.", default_text="32 from 1 billion on, 0 below"
    )
    lora_alpha: Count | None = setting(None, help="Scale of LoRA.", default_text="twice the rank")
    lora_dropout: PartialShare = setting(0.0, help="Of LoRA's input.")
    learning_rate: AboveZero | None = setting(
        None,
        help="Highest.",
        default_text="2e-5, with --texts 0.2 / hidden size; of LoRA 1e-4, with --texts 4e-4",
    )
    batch_size: Count = setting(64, help="Examples or texts a step, over all devices.")
    accumulation: Count = setting(1, help="Batches whose gradients make a step.")
    epochs: AboveZero = setting(1.0, help="Passes over the data.")
    max_steps: Count | None = setting(None, help="Stop after so many.", default_text="by epochs")
    warmup: Share = setting(0.1, help="Share of steps in which the rate rises.")
    schedule: Schedule = setting("linear", help="Of the rate after that.")
    weight_decay: Weight = setting(0.0, help="Of AdamW.")
    max_grad_norm: AboveZero = setting(1.0, help="Of the gradient, at most.")
    bf16: bool | None = setting(None, help="bfloat16 beside float32 weights.", default_text="where it is fast")
    gradient_checkpointing: bool = setting(False, help="Less memory a layer, for a second forward pass.")
    dropout: bool = setting(False, help="Dropout as the model's config says, instead of none.")
    eval_steps: Count | None = setting(None, help="Steps between checkpoints.", default_text="a twentieth of all")
    patience: Count | None = setting(None, help="End after so many checkpoints no better than one before.")
    seed: CountFrom0 = setting(0, help="Of order, sample, dropout and LoRA.")
    log_to: tuple[Reporter, ...] = setting(
        (), help=f"Report there besides log.jsonl: {' or '.join(choices(Reporter))}."
    )


@dataclass(frozen=True)
class DepthSettings(Settings):
    """What is dropped whole.

    Attributes:
        drop_mlp: MLPs; None = half of them, as in EffiR.
        drop_attention: Attentions.
        drop_block: Whole layers.
        criterion: What tells which: a key of ``dropping_order.CRITERIA``.
        num_texts: Texts that importance is measured on, of those that are learned from.
    """

    drop_mlp: CountFrom0 | None = setting(None, help="MLPs to drop.", default_text="half of them")
    drop_attention: CountFrom0 = setting(0, help="Attentions to drop.")
    drop_block: CountFrom0 = setting(0, help="Whole layers to drop.")
    criterion: Criterion = setting("cosine", help="What tells which parts matter least.")
    num_texts: Count = setting(NUM_TEXTS, help="How many texts to take.")


@dataclass(frozen=True)
class ScoringSettings(Settings):
    """How the units of MLPs are scored.

    Attributes:
        criterion: A key of ``unit_scores.UNIT_CRITERIA``.
        steps: Batches: of "gates" the steps of training, of other criteria at most one pass over the data.
        batch_size: Examples or texts of a batch.
        learning_rate: Of the gates.
        penalty: Of open gates, the paper's lambda.
        bf16: Compute the loss in bfloat16 beside float32 weights; None = where the processor does by itself.
        gradient_checkpointing: Keep only the layers' inputs for the backward pass.
        seed: Of samples, order and random scores.
    """

    criterion: UnitCriterion = setting("gates", help="What tells which units matter least.")
    steps: Count = setting(500, help="Batches to score on; but for gates, one pass at most.")
    batch_size: Count = setting(64, help="Examples or texts a batch.")
    learning_rate: AboveZero = setting(0.01, help="Of the gates.")
    penalty: Weight = setting(1e-8, help="Of open gates, the paper's lambda.")
    bf16: bool | None = setting(None, help="bfloat16 beside float32 weights.", default_text="where it is fast")
    gradient_checkpointing: bool = setting(False, help="Less memory a layer, for a second forward pass.")
    seed: CountFrom0 = setting(0, help="Of order, samples and random scores.")


@dataclass(frozen=True)
class WidthSettings(ScoringSettings):
    """How the MLPs that are left are narrowed, besides how their units are scored.

    Attributes:
        narrow: Share of all units left to cut; 0 = none.
        floor: Share of each layer's own units that stays in any case.
        multiple: Of which widths are to be multiples.
    """

    narrow: PartialShare = setting(0.3, help="Share of the MLP units left to cut.")
    floor: Share = setting(0.05, help="Share of each layer's units that stays.")
    multiple: Count = setting(1, help="Let widths be multiples of it.")


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """What the full and the compressed model are measured on at the end.

    Attributes:
        collections: BEIR folders.
        split: Their qrels.
        remove_query: Leave out the document whose id is the query's.
    """

    collections: tuple[str, ...] = setting((), option="--evaluate", help="BEIR folder to compare both models on.")
    split: str = setting("test", help="Its qrels.")
    remove_query: bool = setting(False, help="In all of these, drop the document whose id is the query's.")

    def __post_init__(self) -> None:
        if self.remove_query and not self.collections:
            raise UserError("--remove-query goes with --evaluate")


@dataclass(frozen=True)
class ExportSettings(Settings):
    """What a model, or of --to flex an index, is written as for other programs.

    Attributes:
        to: The format.
        int8: Let matrix products be in int8, with ranges from texts.
        texts: Where these are, each as ``texts.read_texts`` takes it.
        num_texts: How many; half as many others are what the cosine to the model is told of.
        seed: Of their sample.
        weights: Of GGUF, what matrices are stored as.
    """

    to: ExportFormat = setting(help="Format.")
    int8: bool = setting(False, help="Weights and activations in int8; --to openvino alone.")
    texts: tuple[str, ...] = setting((), help="Corpus, topics or text file: ranges for int8, and what is compared on.")
    num_texts: Count = setting(300, help="Texts that ranges are read off; half as many others are compared.")
    seed: CountFrom0 = setting(0, help="Of their sample.")
    weights: GgufWeights = setting("f32", only="--to gguf", help="What matrices are stored as.")

    def __post_init__(self) -> None:
        if self.int8 and self.to != "openvino":
            raise UserError(f"--int8 goes with --to openvino, not with --to {self.to}")
        if self.int8 and not self.texts:
            raise UserError("--int8 reads the ranges of numbers off texts: give --texts, documents such as yours")
        if self.texts and self.to in ("gguf", "flex"):
            raise UserError("--texts goes with --to onnx or openvino")


@dataclass(frozen=True)
class CompressionSettings(Settings):
    """A whole recipe; each section is one of the file, with the names of its fields.

    Attributes:
        encoder: The model that is compressed, folder or hub name.
        output: The new folder; None = it is said elsewhere.
        target: What the model is to be, in place of what goes: see ``study.target.Target``.
        native: Drop whole blocks alone, cut all MLPs to one width, and save the model as one of its family's own class.
        max_length: Tokens of a text that are read in scoring and training; None = the model's.
        seed: Of samples, order, dropout, LoRA's start.
        stock_architecture: See ``EncoderOptions``, for every model of the recipe.
        text: How a text becomes one vector.
        data: What is learned from.
        prune: What is dropped.
        slim: How the rest is narrowed.
        finetune: How it is trained.
        loss: What is minimised, by gates and in training.
        evaluate: What is measured at the end.
    """

    encoder: str = setting(help="Model folder or hub name.", default_text="the recipe's")
    data: DataSettings = setting(help="What is learned from.")
    output: str | None = setting(
        None, help="New model folder; OUTPUT.stages gets that of each stage.", default_text="the recipe's"
    )
    target: str | None = setting(
        None, help="Find what to drop and narrow: parameters=0.5, bytes=40MB, speedup=2, or with --dev quality=0.98."
    )
    native: bool = setting(
        False,
        help="Drop whole blocks, a third or --drop-block, cut all MLPs to one width, and save a stock model.",
    )
    max_length: Count | None = setting(
        None, help="Tokens of a text that analysis and training read.", default_text=MODELS
    )
    seed: CountFrom0 = setting(0, help="Of samples, order, LoRA.")
    stock_architecture: bool = setting(False, help=STOCK)
    text: TextSettings = TextSettings()
    prune: DepthSettings = DepthSettings()
    slim: WidthSettings = WidthSettings()
    finetune: TrainingSettings = TrainingSettings()
    loss: LossSettings = LossSettings()
    evaluate: EvaluationSettings = EvaluationSettings()


@dataclass(frozen=True)
class StudySettings(Settings):
    """Which models a study compares, beside the recipe that says how each of them is made.

    Attributes:
        collections: BEIR folders, each with ``:SPLIT`` at its end if its qrels are others than ``test``.
        remove_query: Leave out the document whose id is the query's, in all of these.
        tables: Which comparisons are made.
        kinds: Kinds of parts that are dropped.
        numbers: How many of each kind; empty, as ``shares`` too = a quarter, half and three quarters of the layers.
        shares: The same as shares of the parameters outside the embeddings, each by the nearest number of parts.
        criteria: What tells which parts go.
        unit_criteria: What tells which units go.
        seeds: Of what is drawn and learned; a row's figure is the mean over them.
        random_seeds: Seeds of the unit criterion "random", at least.
        untrained_only: Train nothing.
        dtypes: Arithmetic that speed is measured in; shapes of equal speed are found in the first one.
        speed_texts: Texts of a round of measuring speed.
    """

    collections: tuple[str, ...] = setting(
        help="BEIR folder to measure on, or FOLDER:SPLIT.", default_text="the recipe's"
    )
    remove_query: bool = setting(False, help="In all of these, drop the document whose id is the query's.")
    tables: tuple[StudyTable, ...] = setting(choices(StudyTable), help="Which comparisons to make.")
    kinds: tuple[PartKind, ...] = setting(("mlp", "attention", "block"), help="Kinds of parts to drop.")
    numbers: tuple[Count, ...] = setting(
        (), help="How many parts of each kind to drop.", default_text="a quarter, half, three quarters of the layers"
    )
    shares: tuple[Annotated[float, Gt(0), Lt(1)], ...] = setting(
        (), help="Share of the parameters to drop with each kind."
    )
    criteria: tuple[Criterion, ...] = setting(choices(Criterion), help="What tells which parts to drop.")
    unit_criteria: tuple[UnitCriterion, ...] = setting(choices(UnitCriterion), help="What tells which units to cut.")
    seeds: tuple[CountFrom0, ...] = setting((0,), help="Of what is drawn and learned.")
    random_seeds: Count = setting(3, help="Seeds of the unit criterion random, at least.")
    untrained_only: bool = setting(False, help="Train nothing.")
    dtypes: tuple[WeightDtype, ...] = setting(("fp32", "bf16"), help="Arithmetic to measure speed in.")
    speed_texts: Count = setting(NUM_TEXTS, help="Texts to measure speed on.")

    def __post_init__(self) -> None:
        for name in ("collections", "tables", "kinds", "criteria", "unit_criteria", "seeds", "dtypes"):
            values = getattr(self, name)
            if not values:
                raise UserError(f"{name}: at least one is needed")
            if len(set(values)) < len(values):
                raise UserError(f"{name}: {', '.join(map(str, values))} names one of them twice")


@dataclass(frozen=True)
class BenchmarkSettings(Settings):
    """How encoders are measured side by side.

    Attributes:
        dtypes: Arithmetic; each model is measured in each of them. Empty = "auto".
        limit: Documents that speed and memory are measured on, the first ones of the corpus.
        rounds: How often these are encoded, and queries are asked.
        threads: Of torch; None = all cores.
        remove_query: Leave out the document whose id is the query's.
    """

    dtypes: tuple[Dtype, ...] = setting(
        (), option="--dtype", help="Arithmetic; fp32,bf16 measures every model in both.", default_text="auto"
    )
    limit: Count = setting(1000, help="Documents to measure speed and memory on, the first ones.")
    rounds: Count = setting(5, help="Rounds of encoding, of which the median counts.")
    threads: Count | None = setting(None, help="Threads of torch.", default_text="all cores")
    remove_query: bool = setting(False, help="Drop the document whose id is the query's.")


@dataclass(frozen=True)
class SuiteSettings(Settings):
    """What is measured on which collections.

    Attributes:
        collections: BEIR folders, folders of them, ``irds:NAME``, ``irds:beir`` for all of BEIR, ``nano`` for NanoBEIR.
        split: Of the folders' qrels.
        mteb: Tasks and benchmarks of mteb that each encoder does by itself; mteb fetches data that it lacks.
        bm25: Measure BM25 too.
        hybrid: Measure each encoder fused with BM25: reciprocal ranks, and scores by a tuned weight.
        prf: Measure each encoder with vector feedback.
        measures: Names of ir-measures or trec_eval; the first one's table is printed.
        hits: Hits a query.
        hits_of: Another depth for a collection, as in arguana=100.
        remove_query_of: Collections in which a query finds itself: the document whose id is the query's is left out.
        tune_queries: At most so many queries that a weight is tuned on.
        seed: Of their sample, and of the bootstrap.
        download: Let ir_datasets fetch what is not on this machine.
    """

    collections: tuple[str, ...] = setting((), help="BEIR folder, folder of them, irds:NAME, irds:beir or nano.")
    split: str = setting("test", help="Qrels of a folder.")
    mteb: tuple[str, ...] = setting((), help="Task or benchmark of mteb, which downloads its data; may be repeated.")
    bm25: bool = setting(False, help="Measure BM25 too.")
    hybrid: bool = setting(False, help="Measure each encoder with BM25: RRF, and a weight tuned on other queries.")
    prf: bool = setting(False, help="Measure each encoder with vector feedback: average, Rocchio.")
    measures: str = setting("nDCG@10 R@100", help="Names of ir-measures or trec_eval.")
    hits: Count = setting(1000, help="Hits a query.")
    hits_of: tuple[str, ...] = setting((), help="Hits in one collection, as in arguana=100.")
    remove_query_of: tuple[str, ...] = setting(
        ("arguana", "quora"), option="--remove-query", help="Collections in which to drop the query's own document."
    )
    tune_queries: Count = setting(1000, help="Queries to tune a weight on, at most.")
    seed: CountFrom0 = setting(0, help="Of their sample, and of the intervals.")
    download: bool = setting(False, help="Let ir_datasets download what is not on this machine.")


# The sections of a recipe, and what each holds.
SECTIONS: dict[str, type[Settings]] = {
    f.name: f.type for f in fields(CompressionSettings) if isinstance(f.type, type) and issubclass(f.type, Settings)
}
