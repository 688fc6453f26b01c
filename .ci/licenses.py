"""Prints name, version and license of every package of the environment, as the packages state them."""

from importlib import metadata


def license_of(package: metadata.Distribution) -> str:
    """The license expression, or else the classifiers, or else the first line of the license field."""
    fields = package.metadata
    classifiers = [c.rpartition(" :: ")[2] for c in fields.get_all("Classifier") or [] if c.startswith("License")]
    first_line = (fields.get("License") or "").partition("\n")[0]
    return fields.get("License-Expression") or "; ".join(classifiers) or first_line or "not stated"


if __name__ == "__main__":
    for package in sorted(metadata.distributions(), key=lambda p: p.metadata["Name"].lower()):
        print(f"{package.metadata['Name']}\t{package.version}\t{license_of(package)}")
