"""Settings come from INTERFLOW_ variables; a bad or unknown one is named in one sentence."""

from pathlib import Path

import pytest

from app.settings import Settings, SettingsError, load_settings


def test_defaults():
    settings = load_settings()
    assert (settings.host, settings.port, settings.exports, settings.model) == (
        "127.0.0.1",
        8000,
        Path("exports"),
        None,
    )
    assert (settings.provider, settings.max_bytes, settings.max_pixels) == ("auto", 10 * 2**20, 50_000_000)
    assert (settings.threads, settings.decode_workers, settings.log_level) == (0, 0, "info")


def test_variables_are_read(monkeypatch):
    monkeypatch.setenv("INTERFLOW_PORT", "81")
    monkeypatch.setenv("INTERFLOW_PROVIDER", "CPU")
    monkeypatch.setenv("INTERFLOW_LOG_LEVEL", "WARNING")
    assert load_settings() == Settings(port=81, provider="cpu", log_level="warning")


@pytest.mark.parametrize("field", Settings.model_fields)
def test_an_empty_variable_counts_as_not_set(monkeypatch, field):
    monkeypatch.setenv(f"INTERFLOW_{field.upper()}", "")
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("port", "abc", "valid integer"),
        ("port", "65536", "less than or equal to 65535"),
        ("provider", "rocm", "'auto', 'cuda' or 'cpu'"),
        ("max_bytes", "0", "greater than 0"),
        ("max_pixels", "178000001", "less than or equal to 178000000"),
        ("versions", "latest", "'newest' or 'all'"),
        ("poll_s", "-1", "greater than or equal to 0"),
        ("poll_s", "inf", "finite"),
        ("max_tensor_bytes", "0", "greater than 0"),
        ("max_json_bytes", "0", "greater than 0"),
        ("max_total_bytes", "60000000", "no less than INTERFLOW_MAX_TENSOR_BYTES, 67108864"),
        ("threads", "-1", "greater than or equal to 0"),
        ("decode_workers", "2.5", "valid integer"),
        ("log_level", "loud", "'debug'"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(monkeypatch, field, value, expected):
    monkeypatch.setenv(f"INTERFLOW_{field.upper()}", value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    message = str(caught.value)
    assert message.startswith(f"INTERFLOW_{field.upper()} is '{value}': ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["INTERFLOW_PROT", "interflow_prot"])
def test_an_unknown_variable_is_refused_with_the_closest_one(monkeypatch, name):
    monkeypatch.setenv(name, "8000")
    with pytest.raises(SettingsError, match=f"{name} is not a setting; the closest is INTERFLOW_PORT"):
        load_settings()


def test_kubernetes_service_variables_are_explained(monkeypatch):
    monkeypatch.setenv("INTERFLOW_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("INTERFLOW_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(SettingsError, match="enableServiceLinks"):
        load_settings()


def test_a_request_allowed_more_than_all_together_is_named(monkeypatch):
    monkeypatch.setenv("INTERFLOW_MAX_BATCH_BYTES", "600000000")
    with pytest.raises(SettingsError, match=r"MAX_TOTAL_BYTES is 536870912: .* INTERFLOW_MAX_BATCH_BYTES, 600000000"):
        load_settings()
    monkeypatch.setenv("INTERFLOW_MAX_TOTAL_BYTES", "600000000")
    load_settings()
