//! Messages, checked field by field. Unknown fields are ignored; every other fault is named. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};

use super::state::Verb;
use crate::layout::{Backing, RegionSpec};
use crate::machine::{Block, LSB_4K};

/// The only version of the protocol.
pub const VERSION: u64 = 1;
/// Most vCPUs of a guest.
pub const MAX_VCPUS: u64 = 16;

/// A message that cannot be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct BadMessage {
    /// Of the request, where it has a usable one: it is answered, and the connection stays.
    pub id: Option<u64>,
    /// E.g. `regions[0].gpa`; empty where no field is to blame.
    pub field: String,
    /// The value and the requirement.
    pub message: String,
}

/// A message of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromDaemon {
    /// `hello` was accepted.
    Welcome,
    /// A memory error is durable.
    Recorded(u64),
    /// `hello` was refused: code and text.
    Refused(String),
    /// A request and its id.
    Request(u64, Request),
}

/// A request with its fields.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "named and described in docs/reference/vmm-protocol.md")]
pub enum Request {
    AttachMemory { socket: String },
    Stop,
    SaveState,
    Resume,
    Abandon,
    Prepare(Prepare),
    LoadState { state: Vec<u8> },
    Start,
    MigrationComplete { keep_uffd: bool },
    Reset,
}

/// Fields of `prepare`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepare {
    /// The layout to make.
    pub regions: Vec<RegionSpec>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Kernel names of userfaultfd features.
    pub uffd_features: Vec<String>,
    /// Path of the pager's memory socket.
    pub socket: String,
}

impl Request {
    /// Which request it is.
    pub fn verb(&self) -> Verb {
        match self {
            Self::AttachMemory { .. } => Verb::AttachMemory,
            Self::Stop => Verb::Stop,
            Self::SaveState => Verb::SaveState,
            Self::Resume => Verb::Resume,
            Self::Abandon => Verb::Abandon,
            Self::Prepare(_) => Verb::Prepare,
            Self::LoadState { .. } => Verb::LoadState,
            Self::Start => Verb::Start,
            Self::MigrationComplete { .. } => Verb::MigrationComplete,
            Self::Reset => Verb::Reset,
        }
    }
}

/// A message of a pager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromPager {
    /// Memory was accepted.
    Attached,
    /// Memory was refused: field and text.
    Refused(String, String),
    /// A page is poison.
    MemoryError(Poisoned),
}

/// A page that the pager says is poison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Poisoned {
    /// As large as its backing's pages are.
    pub block: Block,
    /// Thread that waits on it and will stumble over it (AR); none: nobody does (AO).
    pub waits: Option<u32>,
}

/// An object; its fields are taken one by one; `path` names where it is.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    fn of(value: &'a Value, path: &str) -> Result<Self, BadMessage> {
        let object = value.as_object().ok_or_else(|| bad(path.trim_end_matches('.'), "is not an object"))?;
        Ok(Self { object, path: path.into() })
    }

    fn get<T>(&self, name: &str, what: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Result<T, BadMessage> {
        let field = format!("{}{name}", self.path);
        let value = self.object.get(name).ok_or_else(|| bad(&field, "is missing"))?;
        read(value).ok_or_else(|| bad(&field, &format!("{} is not {what}", shortened(value))))
    }

    fn integer(&self, name: &str) -> Result<u64, BadMessage> {
        self.get(name, "an integer from 0 to 2^64-1", Value::as_u64)
    }

    /// Absent: a page of 4 KiB.
    fn lsb(&self) -> Result<u32, BadMessage> {
        match self.object.contains_key("lsb") {
            false => Ok(LSB_4K),
            true => self.get("lsb", "an integer from 0 to 63", |value| {
                u32::try_from(value.as_u64()?).ok().filter(|lsb| *lsb < u64::BITS)
            }),
        }
    }

    fn text(&self, name: &str) -> Result<&'a str, BadMessage> {
        self.get(name, "a string", Value::as_str)
    }

    fn list(&self, name: &str) -> Result<&'a Vec<Value>, BadMessage> {
        self.get(name, "an array", Value::as_array)
    }
}

fn bad(field: &str, message: &str) -> BadMessage {
    BadMessage { id: None, field: field.into(), message: message.into() }
}

fn shortened(value: &Value) -> String {
    let text = value.to_string();
    text.char_indices().nth(60).map_or(text.clone(), |(end, _)| format!("{}…", &text[..end]))
}

fn parsed(frame: &[u8]) -> Result<Value, BadMessage> {
    serde_json::from_slice(frame).map_err(|error| bad("", &format!("not JSON: {error}")))
}

impl FromDaemon {
    /// Reads a frame of the control socket.
    ///
    /// # Errors
    /// [`BadMessage`], with the id of the request where it has one.
    pub fn parse(frame: &[u8]) -> Result<Self, BadMessage> {
        let value = parsed(frame)?;
        let fields = Fields::of(&value, "")?;
        match fields.text("type")? {
            "welcome" => match fields.integer("version")? {
                VERSION => Ok(Self::Welcome),
                other => Err(bad("version", &format!("{other} is not {VERSION}"))),
            },
            "recorded" => Ok(Self::Recorded(fields.integer("seq")?)),
            "error" => Ok(Self::Refused(format!("{}: {}", fields.text("code")?, fields.text("message")?))),
            name => {
                let id = fields.integer("id")?;
                let request = request(name, &fields).map_err(|error| BadMessage { id: Some(id), ..error })?;
                Ok(Self::Request(id, request))
            }
        }
    }
}

fn request(name: &str, fields: &Fields<'_>) -> Result<Request, BadMessage> {
    let verb = Verb::ALL.into_iter().find(|verb| verb.name() == name);
    let verb = verb.ok_or_else(|| bad("type", &format!("{name:?} is not a request of version {VERSION}")))?;
    Ok(match verb {
        Verb::AttachMemory => Request::AttachMemory { socket: fields.text("socket")?.into() },
        Verb::Stop => Request::Stop,
        Verb::SaveState => Request::SaveState,
        Verb::Resume => Request::Resume,
        Verb::Abandon => Request::Abandon,
        Verb::Prepare => Request::Prepare(prepare(fields)?),
        Verb::LoadState => {
            let state = BASE64.decode(fields.text("state")?);
            Request::LoadState { state: state.map_err(|error| bad("state", &format!("not base64: {error}")))? }
        }
        Verb::Start => Request::Start,
        Verb::MigrationComplete => {
            Request::MigrationComplete { keep_uffd: fields.get("keep_uffd", "a boolean", Value::as_bool)? }
        }
        Verb::Reset => Request::Reset,
    })
}

fn prepare(fields: &Fields<'_>) -> Result<Prepare, BadMessage> {
    let vcpus = fields.integer("vcpus")?;
    let few = u32::try_from(vcpus).ok().filter(|_| (1..=MAX_VCPUS).contains(&vcpus));
    let feature = |(index, value): (usize, &Value)| {
        let field = format!("uffd_features[{index}]");
        value.as_str().map(String::from).ok_or_else(|| bad(&field, &format!("{} is not a string", shortened(value))))
    };
    Ok(Prepare {
        regions: fields.list("regions")?.iter().enumerate().map(region).collect::<Result<_, _>>()?,
        vcpus: few.ok_or_else(|| bad("vcpus", &format!("{vcpus} is not from 1 to {MAX_VCPUS}")))?,
        uffd_features: fields.list("uffd_features")?.iter().enumerate().map(feature).collect::<Result<_, _>>()?,
        socket: fields.text("socket")?.into(),
    })
}

fn region((index, value): (usize, &Value)) -> Result<RegionSpec, BadMessage> {
    let fields = Fields::of(value, &format!("regions[{index}]."))?;
    let backing = fields.get("backing", "\"anonymous\" or \"memfd\"", |value| match value.as_str() {
        Some("anonymous") => Some(Backing::Anonymous),
        Some("memfd") => Some(Backing::Memfd),
        _ => None,
    })?;
    Ok(RegionSpec {
        gpa: fields.integer("gpa")?,
        size: fields.integer("size")?,
        page_size: fields.integer("page_size")?,
        backing,
    })
}

impl FromPager {
    /// Reads a frame of the memory socket.
    ///
    /// # Errors
    /// [`BadMessage`].
    pub fn parse(frame: &[u8]) -> Result<Self, BadMessage> {
        let value = parsed(frame)?;
        let fields = Fields::of(&value, "")?;
        match fields.text("type")? {
            "attached" => match fields.integer("version")? {
                VERSION => Ok(Self::Attached),
                other => Err(bad("version", &format!("{other} is not {VERSION}"))),
            },
            "error" => Ok(Self::Refused(fields.text("field")?.into(), fields.text("message")?.into())),
            "memory_error" => Ok(Self::MemoryError(Poisoned {
                block: Block::around(fields.integer("gpa")?, fields.lsb()?),
                waits: fields
                    .get("severity", "\"AR\" or \"AO\"", |value| match value.as_str() {
                        Some("AR") => Some(true),
                        Some("AO") => Some(false),
                        _ => None,
                    })?
                    .then(|| fields.get("thread", "a thread id", |value| value.as_u64()?.try_into().ok()))
                    .transpose()?,
            })),
            other => Err(bad("type", &format!("{other:?} is not a message of version {VERSION}"))),
        }
    }
}

/// Device state in a message.
pub fn encode_state(state: &[u8]) -> String {
    BASE64.encode(state)
}

/// An answer of success; `fields` is an object with the request's results.
pub fn reply(id: u64, fields: Value) -> Value {
    let mut message = json!({"type": "reply", "id": id});
    if let (Some(message), Value::Object(fields)) = (message.as_object_mut(), fields) {
        message.extend(fields);
    }
    message
}

/// An answer of failure; `id` is absent where the message had none.
pub fn error(id: Option<u64>, code: &str, field: &str, message: &str) -> Value {
    let mut answer = json!({"type": "error", "code": code, "field": field, "message": message});
    if let Some(id) = id {
        answer["id"] = id.into();
    }
    answer
}

#[cfg(test)]
mod tests;
