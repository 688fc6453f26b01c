"""PyArrow's file system of Azure Blob Storage, for ``az://CONTAINER/NAME`` URIs.

The account and its credentials come from the environment variables that Azure's own tools use. Without a key or a SAS
token, Azure's default credentials are tried: managed identities, ``AZURE_CLIENT_ID`` and so on.
"""

import os
from functools import lru_cache

import pyarrow.fs as pafs

from ardiff.data import s3
from ardiff.errors import DataError

ACCOUNT, KEY, SAS_TOKEN = "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"
ENDPOINT = "AZURE_STORAGE_ENDPOINT"
"""Environment variable with the URL of a server other than Azure's, such as an emulator."""


def filesystem() -> pafs.AzureFileSystem:
    """The file system of the account. Azure's library retries on its own for some seconds.

    Raises:
        DataError: No account is named, or ``storage.anonymous`` is set, which PyArrow does not offer for Azure.
    """
    account, key, token, endpoint = (os.environ.get(name, "") for name in (ACCOUNT, KEY, SAS_TOKEN, ENDPOINT))
    if not account:
        raise DataError(f"az:// names a container but no account: set {ACCOUNT}.")
    if s3.current().anonymous:
        raise DataError(f"storage.anonymous does not apply to az://: leave it out and set {SAS_TOKEN} or {KEY}.")
    return _filesystem(account, key, token, endpoint)


@lru_cache(maxsize=8)
def _filesystem(account: str, key: str, token: str, endpoint: str) -> pafs.AzureFileSystem:
    scheme, _, host = endpoint.rstrip("/").rpartition("://")
    server = {"blob_storage_authority": host, "dfs_storage_authority": host} if host else {}
    schemes = {"blob_storage_scheme": scheme, "dfs_storage_scheme": scheme} if scheme else {}
    credentials = {"account_key": key} if key else {"sas_token": token} if token else {}
    return pafs.AzureFileSystem(account, **credentials, **server, **schemes)
