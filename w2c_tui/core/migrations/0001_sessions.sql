-- Sessions, their messages as a tree, the images attached to them, and the search index.
-- Long columns come last: reading the columns before them does not walk a row's overflow pages.

PRAGMA application_id = 0x77326374;  -- 'w2ct'

CREATE TABLE sessions (
    id            TEXT PRIMARY KEY,
    created_at    REAL NOT NULL,
    updated_at    REAL NOT NULL,
    deleted_at    REAL,
    title         TEXT NOT NULL DEFAULT '',
    model         TEXT NOT NULL DEFAULT '',
    params        TEXT NOT NULL DEFAULT '{}',
    scroll        REAL NOT NULL DEFAULT 0,
    -- The end of the branch in sight: the path from here to the root is the conversation.
    leaf_id       INTEGER REFERENCES messages (id) ON DELETE SET NULL,
    system_prompt TEXT NOT NULL DEFAULT '',
    draft         TEXT NOT NULL DEFAULT ''
);
CREATE INDEX sessions_leaf ON sessions (leaf_id);

-- A parent's id is always smaller than its children's. SET NULL and not CASCADE: SQLite cascades by
-- recursion and stops at 1,000 levels, and a conversation may be longer.
CREATE TABLE messages (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    session_id    TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    parent_id     INTEGER REFERENCES messages (id) ON DELETE SET NULL,
    created_at    REAL NOT NULL,
    deleted_at    REAL,
    role          TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant')),
    status        TEXT NOT NULL CHECK (status IN ('complete', 'streaming', 'partial', 'error')),
    -- Who is writing a 'streaming' answer: the name of a lock file (see store.py).
    owner         TEXT,
    finish_reason TEXT NOT NULL DEFAULT '',
    error         TEXT NOT NULL DEFAULT '',
    model         TEXT NOT NULL DEFAULT '',
    stats         TEXT NOT NULL DEFAULT '{}',
    text          TEXT NOT NULL DEFAULT ''
);
CREATE INDEX messages_session ON messages (session_id, parent_id, deleted_at);
CREATE INDEX messages_parent ON messages (parent_id);
CREATE INDEX messages_streaming ON messages (owner) WHERE status = 'streaming';

CREATE TABLE images (
    sha256        TEXT PRIMARY KEY,
    width         INTEGER NOT NULL,
    height        INTEGER NOT NULL,
    data          BLOB NOT NULL
);

-- Without a message the image hangs on the session's draft.
CREATE TABLE attachments (
    id            INTEGER PRIMARY KEY,
    session_id    TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    message_id    INTEGER REFERENCES messages (id) ON DELETE CASCADE,
    position      INTEGER NOT NULL,
    sha256        TEXT NOT NULL REFERENCES images (sha256),
    name          TEXT NOT NULL,
    source        TEXT NOT NULL,
    page_text     TEXT NOT NULL DEFAULT 'null'
);
CREATE INDEX attachments_message ON attachments (message_id, position);
CREATE INDEX attachments_session ON attachments (session_id, message_id);
CREATE INDEX attachments_image ON attachments (sha256);

-- An answer enters the index when it is finished, not twice a second while it is written.
CREATE VIEW searchable AS SELECT id, text FROM messages WHERE status <> 'streaming';
CREATE VIRTUAL TABLE messages_fts USING fts5 (
    text, content = 'searchable', content_rowid = 'id', tokenize = 'unicode61 remove_diacritics 2'
);
CREATE TRIGGER messages_fts_insert AFTER INSERT ON messages BEGIN
    INSERT INTO messages_fts (rowid, text)
        SELECT new.id, new.text WHERE new.status <> 'streaming';
END;
CREATE TRIGGER messages_fts_update AFTER UPDATE OF text, status ON messages BEGIN
    INSERT INTO messages_fts (messages_fts, rowid, text)
        SELECT 'delete', old.id, old.text WHERE old.status <> 'streaming';
    INSERT INTO messages_fts (rowid, text)
        SELECT new.id, new.text WHERE new.status <> 'streaming';
END;
CREATE TRIGGER messages_fts_delete AFTER DELETE ON messages BEGIN
    INSERT INTO messages_fts (messages_fts, rowid, text)
        SELECT 'delete', old.id, old.text WHERE old.status <> 'streaming';
END;
