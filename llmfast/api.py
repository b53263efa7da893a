"""What the commands do, for programs: the functions that they call, what these take, give back and raise.

The verbs have the names of the packages that hold them, so they are here and not in `llmfast` itself. PyTorch and
transformers are imported by what needs them, when it is called. Tutorial: docs/python.md.
"""

from llmfast.bench.cluster import bench_on_cluster
from llmfast.bench.result import Benchmark, Row
from llmfast.bench.stage import BenchOptions, bench
from llmfast.bundle import ModelBundle
from llmfast.doctor.stage import Diagnosis, doctor
from llmfast.errors import (
    GateError,
    InputError,
    LlmfastError,
    NativeCrashError,
    OptionError,
    OutputExistsError,
    ResourceError,
    UnsafeInputError,
    UnsupportedError,
)
from llmfast.export.stage import ExportOptions, export
from llmfast.infer.batch import Batch, Event, Request
from llmfast.infer.cluster.run import ClusterOptions, answer_folder
from llmfast.infer.generate import Generation
from llmfast.infer.many import Summary, answer_file
from llmfast.infer.opening import open_decoder, open_rows
from llmfast.infer.sampling import Sampling
from llmfast.infer.stage import answer, infer
from llmfast.inspect.result import Inspection
from llmfast.inspect.stage import inspect
from llmfast.prune.options import PruneOptions
from llmfast.prune.result import Pruned
from llmfast.prune.stage import prune
from llmfast.quantize.budget import Budget
from llmfast.quantize.calibrate import Calibration
from llmfast.quantize.options import QuantizeOptions
from llmfast.quantize.stage import quantize
from llmfast.report import without_notes
from llmfast.serve.stage import ServeOptions, serve
from llmfast.tokenizer import Tokenizer
from llmfast.tune.options import TuneOptions
from llmfast.tune.stage import Tuned, tune
from llmfast.verdict import Gate, Judgement
from llmfast.verify import compare_with_source, verify_hashes

__all__ = [
    "Batch",
    "BenchOptions",
    "Benchmark",
    "Budget",
    "Calibration",
    "ClusterOptions",
    "Diagnosis",
    "Event",
    "ExportOptions",
    "Gate",
    "GateError",
    "Generation",
    "InputError",
    "Inspection",
    "Judgement",
    "LlmfastError",
    "ModelBundle",
    "NativeCrashError",
    "OptionError",
    "OutputExistsError",
    "PruneOptions",
    "Pruned",
    "QuantizeOptions",
    "Request",
    "ResourceError",
    "Row",
    "Sampling",
    "ServeOptions",
    "Summary",
    "Tokenizer",
    "TuneOptions",
    "Tuned",
    "UnsafeInputError",
    "UnsupportedError",
    "answer",
    "answer_file",
    "answer_folder",
    "bench",
    "bench_on_cluster",
    "compare_with_source",
    "doctor",
    "export",
    "infer",
    "inspect",
    "open_decoder",
    "open_rows",
    "prune",
    "quantize",
    "serve",
    "tune",
    "verify_hashes",
    "without_notes",
]
