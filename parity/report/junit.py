"""Writes a report as JUnit XML, for test runners."""

import json
import xml.etree.ElementTree as ET

from parity.report.saved import Report


def to_xml(report: Report) -> bytes:
    """Returns JUnit XML with a suite for each rung and a test case for each array and precision. A suite's properties
    name the differences that were accepted."""
    suites = ET.Element(
        "testsuites", name=f"parity: {report['sides']['candidate']} against {report['sides']['reference']}"
    )
    for rung in report["rungs"]:
        failures = [line for line in rung["lines"] if line["verdict"] == "bug"]
        suite = ET.SubElement(
            suites,
            "testsuite",
            name=rung["name"],
            tests=str(len(rung["lines"])),
            failures=str(len(failures)),
            time=f"{rung['seconds']:.3f}",
        )
        if accepted := report["attestation"].get("accepted"):
            properties = ET.SubElement(suite, "properties")
            for clause in accepted:
                ET.SubElement(properties, "property", name="accepted", value=clause)
        for line in rung["lines"]:
            name = f"{line['name']} [{line['precision']}]"
            case = ET.SubElement(suite, "testcase", classname=f"parity.{rung['name']}", name=name)
            if line["verdict"] == "bug":
                message = line["note"] or f"difference {line['difference']}, limit {line['limit']}"
                ET.SubElement(case, "failure", message=message).text = json.dumps(line)
    ET.indent(suites)
    return ET.tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n"
