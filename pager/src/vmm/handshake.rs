//! The one message of a VMM on the memory socket, parsed and held against the expected layout. Pure: descriptors are
//! numbers here.

use serde_json::{Map, Value};

use crate::layout::{Backing, Hva, MemoryLayout};

/// Longest message, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// Most descriptors.
pub const MAX_DESCRIPTORS: usize = 64;
/// Version of the protocol.
pub const VERSION: u64 = 1;

/// Why a message is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Refusal {
    /// Which field, e.g. `regions[1].size`; `message` for the message itself, `descriptors` for those.
    pub field: String,
    /// The actual value and the requirement.
    pub message: String,
}

impl Refusal {
    /// Names a field.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

/// The layout and role that the pager expects of the VMM.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Name of the VM.
    pub vm: String,
    /// True for a destination.
    pub destination: bool,
    /// Its layout.
    pub layout: MemoryLayout,
}

/// A message that fits, with the meaning of each descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    /// The VMM's process; `None` in Firecracker's form (the peer of the socket).
    pub pid: Option<u32>,
    /// The regions, in the order of the layout.
    pub regions: Vec<HandshakeRegion>,
    /// Firecracker's form: nothing is ever sent back.
    pub silent: bool,
    /// After the end the memory is to be made of huge pages.
    pub collapse: bool,
    /// Index of the eventfd that is rung for frames.
    pub doorbell: Option<usize>,
    /// Index of a pidfd: the memory lives as long as this process, not as long as the connection.
    pub process: Option<usize>,
}

impl Handshake {
    fn names(&self, index: usize) -> bool {
        let of_region = |r: &HandshakeRegion| r.uffd == Some(index) || r.file.is_some_and(|(file, _)| file == index);
        self.doorbell == Some(index) || self.process == Some(index) || self.regions.iter().any(of_region)
    }
}

/// Where a region is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandshakeRegion {
    /// First byte.
    pub hva: Hva,
    /// Index of its file's descriptor, and the offset in it.
    pub file: Option<(usize, u64)>,
    /// Index of the userfaultfd that it is registered with; a destination's has one.
    pub uffd: Option<usize>,
}

/// Whether bytes are a whole JSON value yet.
///
/// # Errors
/// They never will be: not JSON, or something follows it.
pub fn complete(bytes: &[u8]) -> Result<Option<Value>, Refusal> {
    let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>();
    match values.next() {
        None => Ok(None),
        Some(Err(error)) if error.is_eof() => Ok(None),
        Some(Err(error)) => Err(Refusal::new("message", format!("is not JSON: {error}"))),
        Some(Ok(value)) if value.is_object() || value.is_array() => {
            let rest = &bytes[values.byte_offset()..];
            match rest.iter().all(u8::is_ascii_whitespace) {
                true => Ok(Some(value)),
                false => Err(Refusal::new("message", format!("{} bytes follow the JSON value", rest.len()))),
            }
        }
        Some(Ok(_)) => Err(Refusal::new("message", "is neither an object nor an array")),
    }
}

/// Compares a message with the expectation.
///
/// # Errors
/// [`Refusal`] names the first field that does not fit.
pub fn validate(message: &Value, descriptors: usize, expected: &Expected) -> Result<Handshake, Refusal> {
    if descriptors > MAX_DESCRIPTORS {
        return Err(Refusal::new("descriptors", format!("{descriptors} are more than {MAX_DESCRIPTORS}")));
    }
    let handshake = match message {
        Value::Array(regions) => firecracker(regions, descriptors, expected)?,
        Value::Object(object) => full(object, descriptors, expected)?,
        _ => return Err(Refusal::new("message", "is neither an object nor an array")),
    };
    match (0..descriptors).find(|index| !handshake.names(*index)) {
        Some(index) => Err(Refusal::new("descriptors", format!("no field names descriptor {index}"))),
        None => Ok(handshake),
    }
}

fn full(object: &Map<String, Value>, descriptors: usize, expected: &Expected) -> Result<Handshake, Refusal> {
    let top = Fields { object, prefix: String::new(), descriptors };
    let version = top.number("version")?;
    if version != VERSION {
        return Err(Refusal::new("version", format!("{version} is not {VERSION}")));
    }
    top.is("vm", &expected.vm)?;
    top.is("role", if expected.destination { "destination" } else { "source" })?;
    let pid = top.number("pid")?;
    let pid = u32::try_from(pid).ok().filter(|pid| (1..=i32::MAX as u32).contains(pid));
    let pid = pid.ok_or_else(|| Refusal::new("pid", "is no process id"))?;
    let uffd = top.of_destination("uffd", expected)?;
    let doorbell = top.of_destination("doorbell", expected)?;
    let process = object.contains_key("process").then(|| top.index("process")).transpose()?;
    if process.is_some() && doorbell.is_some() {
        return Err(Refusal::new("doorbell", "is never rung: no frame follows where a process is named"));
    }
    let collapse = match object.get("collapse") {
        None => false,
        Some(Value::Bool(collapse)) => *collapse,
        Some(_) => return Err(Refusal::new("collapse", "is neither true nor false")),
    };
    let regions = match object.get("regions") {
        Some(Value::Array(regions)) => regions,
        Some(_) => return Err(Refusal::new("regions", "is not an array")),
        None => return Err(Refusal::new("regions", "is missing")),
    };
    count_fits(regions.len(), expected)?;
    let mut places = Vec::new();
    for (index, (value, region)) in regions.iter().zip(expected.layout.regions()).enumerate() {
        let fields = Fields::of(value, format!("regions[{index}]"), descriptors)?;
        fields.number_is("gpa", region.gpa.0)?;
        fields.number_is("size", region.size)?;
        fields.number_is("page_size", region.page_size)?;
        let backing = match region.backing {
            Backing::Anonymous => "anonymous",
            Backing::Memfd => "memfd",
        };
        fields.is("backing", backing)?;
        let file = match region.backing {
            Backing::Memfd => Some((fields.index("fd")?, fields.number("offset")?)),
            Backing::Anonymous if fields.object.contains_key("fd") => {
                return Err(Refusal::new(fields.name("fd"), "anonymous memory has none"));
            }
            Backing::Anonymous => None,
        };
        if let Some((_, offset)) = file
            && !offset.is_multiple_of(region.page_size)
        {
            return Err(Refusal::new(fields.name("offset"), format!("{offset:#x} is not aligned")));
        }
        let uffd = fields.of_destination("uffd", expected)?.or(uffd);
        if uffd.is_none() && expected.destination {
            return Err(Refusal::new(
                "uffd",
                format!("is missing: a destination needs one, and regions[{index}] has none"),
            ));
        }
        places.push(HandshakeRegion { hva: fields.hva(region.size, region.page_size)?, file, uffd });
    }
    check_disjoint(&places, &expected.layout)?;
    Ok(Handshake { pid: Some(pid), regions: places, silent: false, collapse, doorbell, process })
}

/// Firecracker's bare array: regions are matched by ascending offset, which must be the sum of the sizes before.
fn firecracker(regions: &[Value], descriptors: usize, expected: &Expected) -> Result<Handshake, Refusal> {
    if !expected.destination {
        return Err(Refusal::new("role", "a bare array is a destination, not a source"));
    }
    is_sent("uffd".into(), 0, descriptors)?;
    count_fits(regions.len(), expected)?;
    let mut found = Vec::new();
    for (index, value) in regions.iter().enumerate() {
        let fields = Fields::of(value, format!("[{index}]"), descriptors)?;
        found.push((fields.number("offset")?, fields));
    }
    found.sort_by_key(|(offset, _)| *offset);
    let mut sum = 0;
    let mut places = Vec::new();
    for ((offset, fields), region) in found.into_iter().zip(expected.layout.regions()) {
        if offset != sum {
            let message = format!("{offset:#x} is not {sum:#x}, the sum of the sizes before");
            return Err(Refusal::new(fields.name("offset"), message));
        }
        fields.number_is("size", region.size)?;
        fields.number_is("page_size", region.page_size)?;
        places.push(HandshakeRegion { hva: fields.hva(region.size, region.page_size)?, file: None, uffd: Some(0) });
        sum += region.size;
    }
    check_disjoint(&places, &expected.layout)?;
    Ok(Handshake { pid: None, regions: places, silent: true, collapse: false, doorbell: None, process: None })
}

fn is_sent(field: String, index: usize, descriptors: usize) -> Result<(), Refusal> {
    match index < descriptors {
        true => Ok(()),
        false => Err(Refusal::new(field, format!("descriptor {index} is missing: {descriptors} were sent"))),
    }
}

fn count_fits(count: usize, expected: &Expected) -> Result<(), Refusal> {
    let needed = expected.layout.regions().len();
    match count == needed {
        true => Ok(()),
        false => Err(Refusal::new("regions", format!("{count} regions are not the {needed} of the layout"))),
    }
}

fn check_disjoint(places: &[HandshakeRegion], layout: &MemoryLayout) -> Result<(), Refusal> {
    let mut ranges: Vec<_> =
        places.iter().zip(layout.regions()).enumerate().map(|(i, (p, r))| (p.hva.0, p.hva.0 + r.size, i)).collect();
    ranges.sort_unstable();
    match ranges.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        None => Ok(()),
        Some(pair) => {
            let field = format!("regions[{}].base_host_virt_addr", pair[1].2);
            Err(Refusal::new(field, format!("{:#x} lies in region {}", pair[1].0, pair[0].2)))
        }
    }
}

/// The fields of an object, which know their own names.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    prefix: String,
    /// How many came with the message.
    descriptors: usize,
}

impl<'a> Fields<'a> {
    fn of(value: &'a Value, prefix: String, descriptors: usize) -> Result<Self, Refusal> {
        match value {
            Value::Object(object) => Ok(Self { object, prefix, descriptors }),
            _ => Err(Refusal::new(prefix, "is not an object")),
        }
    }

    fn name(&self, field: &str) -> String {
        if self.prefix.is_empty() { field.to_owned() } else { format!("{}.{field}", self.prefix) }
    }

    fn get(&self, field: &str) -> Result<&Value, Refusal> {
        self.object.get(field).ok_or_else(|| Refusal::new(self.name(field), "is missing"))
    }

    fn number(&self, field: &str) -> Result<u64, Refusal> {
        let value = self.get(field)?;
        value.as_u64().ok_or_else(|| Refusal::new(self.name(field), "is not an integer of 0 to 2^64-1"))
    }

    fn index(&self, field: &str) -> Result<usize, Refusal> {
        let number = self.number(field)?;
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        is_sent(self.name(field), index, self.descriptors)?;
        Ok(index)
    }

    /// A descriptor that only a destination has, where it is there.
    fn of_destination(&self, field: &str, expected: &Expected) -> Result<Option<usize>, Refusal> {
        match (self.object.contains_key(field), expected.destination) {
            (false, _) => Ok(None),
            (true, true) => self.index(field).map(Some),
            (true, false) => Err(Refusal::new(self.name(field), "a source has none")),
        }
    }

    fn number_is(&self, field: &str, needed: u64) -> Result<(), Refusal> {
        let number = self.number(field)?;
        match number == needed {
            true => Ok(()),
            false => Err(Refusal::new(self.name(field), format!("{number:#x} is not {needed:#x}, that of the layout"))),
        }
    }

    fn is(&self, field: &str, needed: &str) -> Result<(), Refusal> {
        match self.get(field)? {
            Value::String(text) if text == needed => Ok(()),
            Value::String(text) => {
                let text: String = text.chars().take(80).collect();
                Err(Refusal::new(self.name(field), format!("{text:?} is not {needed:?}")))
            }
            _ => Err(Refusal::new(self.name(field), "is not a string")),
        }
    }

    fn hva(&self, size: u64, page_size: u64) -> Result<Hva, Refusal> {
        let name = "base_host_virt_addr";
        let hva = self.number(name)?;
        if !hva.is_multiple_of(page_size) {
            return Err(Refusal::new(self.name(name), format!("{hva:#x} is not aligned to {page_size:#x}")));
        }
        match hva.checked_add(size) {
            Some(_) => Ok(Hva(hva)),
            None => Err(Refusal::new(self.name(name), format!("{hva:#x} ends beyond 2^64"))),
        }
    }
}

#[cfg(test)]
mod tests;
