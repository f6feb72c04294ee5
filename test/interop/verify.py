import base64
import time
import urllib.request
import zlib

import jwt  # PyJWT[crypto]

ALGORITHMS = ["ES256", "EdDSA"]


class Revoked(Exception):
    pass


class Verifier:
    """Holds tokens to Writ's keys. Raises jwt.PyJWTError, or Revoked."""

    def __init__(self, issuer, audience):
        self.issuer, self.audience = issuer, audience
        self.keys = jwt.PyJWKClient(issuer + "/.well-known/jwks.json", lifespan=300)
        self.lists = {}  # by URI, as long as their ttl says

    def _decode(self, token, typ, **more):
        key = self.keys.get_signing_key_from_jwt(token)
        if jwt.get_unverified_header(token).get("typ") != typ:  # signed too: decode verifies it
            raise jwt.InvalidTokenError("not a " + typ)
        return jwt.decode(token, key, algorithms=ALGORITHMS, issuer=self.issuer, leeway=30, **more)

    def _bits(self, uri):
        bits, until = self.lists.get(uri, (None, 0))
        if time.monotonic() < until:
            return bits
        ask = urllib.request.Request(uri, headers={"Accept": "application/statuslist+jwt"})
        with urllib.request.urlopen(ask, timeout=5) as answer:
            token = answer.read(1 << 20).decode()
        claims = self._decode(token, "statuslist+jwt", subject=uri, options={"require": ["exp", "iat", "sub"]})
        if claims["status_list"]["bits"] != 1:
            raise jwt.InvalidTokenError("a status list not of one bit")
        packed = claims["status_list"]["lst"]
        bits = zlib.decompressobj().decompress(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)), 1 << 20)
        self.lists[uri] = bits, time.monotonic() + claims["ttl"]
        return bits

    def verify(self, token):
        required = ["exp", "sub", "client_id", "jti", "scope"]
        claims = self._decode(token, "at+jwt", audience=self.audience, options={"require": required})
        status = claims.get("status", {}).get("status_list")  # only where the minter has checks: status_list
        if status:
            if not status["uri"].startswith(self.issuer + "/status/"):
                raise jwt.InvalidTokenError("a status list of somebody else")
            at = status["idx"]
            if self._bits(status["uri"])[at >> 3] >> (at & 7) & 1:
                raise Revoked()
        return claims
