from __future__ import annotations

from pages import hardware, interval, spread, table

TITLE = "HVL on dermoscopy and histology"


def hvl_rows(found: dict) -> list[list[str]]:
    kinds = [(kind, measure) for kind in ("near", "far") for measure in ("auroc", "fpr95")]
    return [
        [name, spread(row["accuracy"]), interval(row["auroc"]), *(spread(row[kind][m]) for kind, m in kinds)]
        for name, row in found.items()
    ]


def section(results: dict) -> str:
    header = ["method", "accuracy", "AUROC", "near AUROC", "near FPR95", "far AUROC", "far FPR95"]
    found, backbone = results["results"], results["environment"]["backbone"]
    parts = [
        f"""## {TITLE}

Percent; `hvl` divides a scale's probabilities by all tiles, `hvl_kept` by those kept (one training). Mean and standard
deviation over {len(results["settings"]["seeds"])} seeds, in brackets the 95 % interval of the mean; methods without
chance run once. Backbone `{backbone["spec"]}` (fingerprint `{backbone["fingerprint"][:12]}`), which saw no medical
image and is not CLIP: the table compares methods on one backbone, not with the paper. The AUROC is the average over
all OOD sets; near sets are of the same kind of image, far ones are not.
"""
    ]
    about = {
        "ham-4": "`ham-4`: nevus, melanoma, dermatofibroma and vascular lesion known; near: actinic keratosis, basal "
        "cell carcinoma, benign keratosis; far: histology, textures. Lesions of train and test are apart.",
        "histology-5": "`histology-5`: two of five tissues left out, average of the ten ways; far: dermoscopy.",
    }
    for name, text in about.items():
        if name in found:
            parts.append(f"{text}\n\n{table(header, hvl_rows(found[name]))}")
    titles = {
        "parts": "Parts of HVL (the paper's Table 2, and no lower scales)",
        "epochs": "Length of training, with and without cross-scale fusion (CSF)",
        "k": "Pseudo-OOD tiles K",
        "n": f"Partitions n, at most {results['settings']['images_in_study_of_n']} images per part",
    }
    for study, title in titles.items():
        for name, settings in found.get(study, {}).items():
            rows = [
                [label + (", `kept`" if name == "hvl_kept" else ""), *row[1:]]
                for label, of in settings.items()
                for name in ("hvl", "hvl_kept")
                for row in hvl_rows({name: of[name]})
            ]
            parts.append(f"{title}, `{name}`:\n\n{table(['setting', *header[1:]], rows)}")
    parts.append(
        "Made by `uv run python benchmarks/hvl.py --packs FOLDER --work FOLDER`; "
        + hardware(results["environment"])
        + "."
    )
    return "\n".join(parts) + "\n"
