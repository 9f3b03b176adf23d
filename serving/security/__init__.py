"""How a server is protected, whatever protocol it speaks: TLS, tokens, scopes, the audit log."""
