"""Verifies the tokens that come as JSON on standard input and writes what became of each."""
import json
import sys
import traceback

import jwt

from verify import Revoked, Verifier

asked = json.load(sys.stdin)
verifier = Verifier(asked["issuer"], asked["audience"])
results = {}
for name, token in asked["tokens"].items():
    try:
        claims = verifier.verify(token)
        results[name] = "good for " + claims["authorization_details"][0]["actions"][0]
    except Revoked:
        results[name] = "revoked"
    except jwt.PyJWTError as err:
        results[name] = f"refused: {err}"
    except Exception:
        results[name] = "failed: " + traceback.format_exc()
json.dump(results, sys.stdout)
