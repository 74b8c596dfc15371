from __future__ import annotations

import pytest

from mlpipe.addresses import redact_address, redact_models, redact_text, redact_uri, without_login


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("/a/b?c#d", "/a/b?c#d"),
        ("https://user:pa@ss@host:8/a/b?sig=1#sha256=2", "https://host:8/a/b?…"),
        ("https://host?token=a/b@c", "https://host?…"),
        ("https://host/a#sha256=2", "https://host/a"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("s3://key:a/b+c@bucket/key", "s3://bucket/key"),
        ("https://user:a#b?c@host/a", "https://host/a"),
        ("https://user:cut-off", "https://…"),
        ("https://[::1]:80/a", "https://[::1]:80/a"),
        ("https://host/a@b", "https://host/a@b"),
        ("file:///a/b", "file:///a/b"),
    ],
)
def test_an_address_is_shown_without_login_and_query(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("resnet18,custom_cnn", "resnet18,custom_cnn"),
        ("resnet18=https://u:p@h/w.pth?sig=1,custom_cnn", "resnet18=https://h/w.pth?…"),
        ("a=https://u:p@h/w.pth,b=s3://u:p@h/w.pth", "a=https://h/w.pth,b=…"),
        ("a=https://h/w.pth?from=https://h/x&sig=1", "a=https://h/w.pth?…"),
    ],
)
def test_in_text_nothing_secret_of_an_address_is_shown(text: str, shown: str) -> None:
    assert redact_text(text) == shown


def test_the_rest_of_an_address_without_its_login_stays() -> None:
    assert without_login("https://user:pass@host:5000/mlflow?a=b#c") == "https://host:5000/mlflow?a=b#c"
    assert without_login("sqlite:////a/mlflow.db") == "sqlite:////a/mlflow.db"


CHECKSUM = f"#sha256={'ab' * 32}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://u:p@h/a.zip?sig=1{CHECKSUM}", f"https://h/a.zip?…{CHECKSUM}"),
        (f" s3://b/a.zip{CHECKSUM}", f" s3://b/a.zip{CHECKSUM}"),
        (f"a.zip{CHECKSUM}", f"a.zip{CHECKSUM}"),
        ("https://h/a.zip#sha256=cut", "https://h/a.zip"),
    ],
)
def test_an_address_is_shown_with_its_checksum(text: str, shown: str) -> None:
    assert redact_address(text) == shown


@pytest.mark.parametrize(
    ("models", "shown"),
    [
        (f"resnet18=https://a/w.pth{CHECKSUM},custom_cnn", f"resnet18=https://a/w.pth{CHECKSUM},custom_cnn"),
        ("resnet18=s3://a/w.pth, resnet50=s3://b/v.pth,x", "resnet18=s3://a/w.pth,resnet50=s3://b/v.pth,x"),
        ("resnet18=models:/pets@champion,/a/b.py:Net", "resnet18=models:/pets@champion,/a/b.py:Net"),
        ("a=https://u:secret@h/w.pth?sig=secret,b", "a=https://h/w.pth?…,b"),
        ("a=https://u:se,cret@h/w.pth,b", "a=https://h/w.pth,b"),
    ],
)
def test_of_a_list_of_models_each_address_is_shown(models: str, shown: str) -> None:
    assert redact_models(models) == shown
