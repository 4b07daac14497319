"""What is in the bundle, as an SPDX 2.3 document. No clock and nothing at random: the same lock gives the same."""
import datetime
import hashlib
import json
import re

import lock


def document(version: str, licence: str, epoch: int, packages: list[lock.Package],
             parts: list[lock.Package], artefacts: dict[str, str]) -> str:
    """The document. `packages` are in the bundle (`parts`), or made it; `artefacts`, name -> sha256, are released."""
    entries = [{"SPDXID": "SPDXRef-cni-portmap", "name": "cni-portmap", "versionInfo": version, "downloadLocation":
                "NOASSERTION", "filesAnalyzed": False, "licenseConcluded": "GPL-2.0-or-later",
                "licenseDeclared": licence, "copyrightText": "NOASSERTION"}]
    relations = [_relation("SPDXRef-DOCUMENT", "DESCRIBES", "SPDXRef-cni-portmap")]
    for package in packages:
        words = "SPDXRef", package.suite, package.name, package.architecture
        identifier = re.sub(r"[^A-Za-z0-9.-]", "-", "-".join(words))
        entries.append({
            "SPDXID": identifier, "name": package.name, "versionInfo": package.version,
            "supplier": "Organization: Debian", "downloadLocation": "NOASSERTION", "filesAnalyzed": False,
            "licenseConcluded": package.licence or "NOASSERTION", "licenseDeclared": "NOASSERTION",
            "copyrightText": "NOASSERTION", "checksums": [{"algorithm": "SHA256", "checksumValue": package.sha256}],
            "externalRefs": [{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator":
                              f"pkg:deb/debian/{package.name}@{package.version}?arch={package.architecture}"
                              f"&distro={package.suite}"}]})
        relations.append(_relation("SPDXRef-cni-portmap", "CONTAINS", identifier) if package in parts else
                         _relation(identifier, "BUILD_TOOL_OF", "SPDXRef-cni-portmap"))
    files = [{"SPDXID": f"SPDXRef-file-{index}", "fileName": f"./{name}", "copyrightText": "NOASSERTION",
              "licenseConcluded": "NOASSERTION", "checksums": [{"algorithm": "SHA256", "checksumValue": digest}]}
             for index, (name, digest) in enumerate(sorted(artefacts.items()))]
    name = f"cni-portmap-{version}"
    space = hashlib.sha256(json.dumps([entries, files], sort_keys=True).encode()).hexdigest()
    created = datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return json.dumps({
        "spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT", "name": name,
        "documentNamespace": f"urn:sha256:{space}", "creationInfo": {"created": created, "creators":
                                                                     ["Tool: cni-portmap-scripts-release"]},
        "packages": entries, "files": files, "relationships": relations}, indent=1, sort_keys=True) + "\n"


def _relation(one: str, kind: str, other: str) -> dict[str, str]:
    return {"spdxElementId": one, "relationshipType": kind, "relatedSpdxElement": other}
