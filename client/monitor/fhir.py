"""Alerts as HL7 FHIR R4 resources (http://hl7.org/fhir/R4): what was measured, and the issue that was detected.

Each alert is two files, named by its id, so that writing them again changes nothing: an ``Observation`` of the
reading, coded by LOINC 99504-3 (glucose in interstitial fluid, mass per volume) in UCUM's mg/dL, and a
``DetectedIssue`` that points to it. The issue is *preliminary*: a model said so, no clinician has looked.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from client.monitor.alarm import MODEL_FAILED, NO_FORECAST, SENSOR_STUCK, Alert
from shared.files import storage_errors, write_atomic

LOINC: Final = "http://loinc.org"
UCUM: Final = "http://unitsofmeasure.org"
_CATEGORY: Final = "http://terminology.hl7.org/CodeSystem/observation-category"
_INTERSTITIAL_GLUCOSE: Final = {
    "system": LOINC,
    "code": "99504-3",
    "display": "Glucose [Mass/volume] in Interstitial fluid",
}
_SAID: Final = {"low": "Low glucose", "high": "High glucose", NO_FORECAST: "Glucose forecast missing:"}
_WHY: Final = {MODEL_FAILED: "the model's forecast is not a number", SENSOR_STUCK: "the sensor writes one value"}


def observation(alert: Alert) -> dict[str, Any]:
    """Return the reading behind an alert as an Observation. Its time must have an offset, as FHIR demands."""
    return {
        "resourceType": "Observation",
        "id": alert.id,
        "status": "preliminary",
        "category": [{"coding": [{"system": _CATEGORY, "code": "laboratory"}]}],
        "code": {"coding": [_INTERSTITIAL_GLUCOSE], "text": "Glucose, continuous sensor"},
        "subject": _patient(alert),
        "effectiveDateTime": alert.time,
        "valueQuantity": {"value": alert.glucose_mg_dl, "unit": "mg/dL", "system": UCUM, "code": "mg/dL"},
    }


def detected_issue(alert: Alert) -> dict[str, Any]:
    """Return an alert as a DetectedIssue that points to its Observation."""
    urgent = alert.kind == NO_FORECAST or (alert.kind == "low" and alert.stage == "present")
    return {
        "resourceType": "DetectedIssue",
        "id": alert.id,
        "status": "preliminary",
        "code": {"text": f"{_SAID[alert.kind]} {alert.stage}"},
        "severity": "high" if urgent else "moderate",
        "patient": _patient(alert),
        "identifiedDateTime": alert.time,
        "implicated": [{"reference": f"Observation/{alert.id}"}],
        "detail": _detail(alert),
    }


def write_fhir(folder: Path, alerts: Sequence[Alert]) -> None:
    """Write the resources of some alerts, readable by their owner only: they name patients.

    Raises:
        StorageError: If the folder cannot be written.
    """
    for alert in alerts:
        for resource in (observation(alert), detected_issue(alert)):
            path = folder / f"{resource['resourceType']}-{alert.id}.json"
            write_atomic(path, json.dumps(resource, indent=1).encode() + b"\n", private=True)


def make_folder(folder: Path) -> None:
    """Make the folder of the resources, for its owner only. Raises StorageError."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def _patient(alert: Alert) -> dict[str, Any]:
    return {"identifier": {"value": alert.patient_id}}


def _detail(alert: Alert) -> str:
    said = f"Glucose {alert.glucose_mg_dl:g} mg/dL."
    if alert.reason is not None:
        return (
            f"{said} No lows or highs are foreseen: {_WHY[alert.reason]}. Look after the patient without the monitor."
        )
    if alert.band_mg_dl is not None and alert.stage == "predicted":
        beyond = "below" if alert.kind == "low" else "above"
        said += f" Forecast to pass {beyond} {alert.threshold_mg_dl:g} mg/dL in {alert.expected_in_min} min"
        said += f" (quantile {alert.quantile:g}, most {alert.forecast_mg_dl:g} mg/dL)."
    return f"{said} Said by a forecasting model; not reviewed."
