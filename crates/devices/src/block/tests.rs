use std::io::Write;
use std::process::Command;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::*;

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn raw_file(dir: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img is needed (Debian: qemu-utils)");
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn qcow2_file(dir: &tempfile::TempDir, size: &str, options: &str) -> PathBuf {
    let path = dir.path().join("disk.qcow2");
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend([path.to_str().unwrap(), size]);
    qemu_img(&arguments);
    path
}

fn message(spec: &DiskSpec) -> String {
    open(spec).err().expect("an error").to_string()
}

#[test]
fn disk_options_are_understood() {
    let spec: DiskSpec = "/a,,b.img,ro,format=qcow2,backing=on".parse().unwrap();
    assert_eq!(
        spec,
        DiskSpec {
            path: "/a,b.img".into(),
            read_only: true,
            format: Some(Format::Qcow2),
            follow_references: true,
            bus: DeviceBus::Virtio,
            dvd: false,
            persistent_grants: false,
        }
    );
    assert_eq!(spec.to_string().parse(), Ok(spec));
    for text in ["b,bus=xen", "b,bus=xen,persistent-grants"] {
        assert_eq!(text.parse::<DiskSpec>().unwrap().to_string(), text);
    }
    assert!("x,format=vmdk".parse::<DiskSpec>().unwrap_err().contains("format=vmdk"));
    assert!("".parse::<DiskSpec>().unwrap_err().contains("file name"));
}

#[test]
fn raw_images_keep_what_is_written() {
    let dir = scratch();
    let path = raw_file(&dir, &[0; 8192]);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    assert_eq!(disk.size(), 8192);
    disk.write_at(512, &[7; 1024]).unwrap();
    disk.flush().unwrap();
    let mut data = [0; 2048];
    disk.read_at(0, &mut data).unwrap();
    assert_eq!((data[511], data[512], data[1535], data[1536]), (0, 7, 7, 0));
    assert_eq!(std::fs::read(&path).unwrap()[..2048], data);
}

#[test]
fn the_last_sector_of_a_raw_image_is_made_whole() {
    let dir = scratch();
    let disk = open(&DiskSpec::new(raw_file(&dir, &[5; 700]))).unwrap();
    assert_eq!(disk.size(), 1024);
    let memory = vmm::memory::map(&[(0, 4096)]).unwrap();
    let slice = memory.get_slice(GuestAddress(0), 1024).unwrap();
    slice.copy_from(&[1u8; 1024]);
    disk.read_to_guest(0, &[slice.subslice(0, 600).unwrap(), slice.subslice(600, 424).unwrap()]).unwrap();
    let mut data = [9u8; 1024];
    slice.copy_to(&mut data);
    assert_eq!((data[699], data[700], data[1023]), (5, 0, 0));
}

#[test]
fn guest_memory_is_moved_directly_and_in_pieces() {
    for format in [Format::Raw, Format::Qcow2] {
        let dir = scratch();
        let path = if format == Format::Raw { raw_file(&dir, &vec![0; 4 << 20]) } else { qcow2_file(&dir, "4M", "") };
        let disk = open(&DiskSpec::new(path)).unwrap();
        let memory = vmm::memory::map(&[(0, 4 << 20)]).unwrap();
        let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let whole = memory.get_slice(GuestAddress(0), 1 << 20).unwrap();
        whole.copy_from(&bytes);
        // 1500 pieces are more than the host takes at once.
        let mut pieces: Vec<GuestSlice<'_>> = (0..1499).map(|at| whole.subslice(at * 512, 512).unwrap()).collect();
        pieces.push(whole.subslice(1499 * 512, (1 << 20) - 1499 * 512).unwrap());
        disk.write_from_guest(1024, &pieces).unwrap();
        let back = memory.get_slice(GuestAddress(2 << 20), 1 << 20).unwrap();
        disk.read_to_guest(1024, &[back.subslice(0, 3).unwrap(), back.subslice(3, (1 << 20) - 3).unwrap()]).unwrap();
        let mut read = vec![0; 1 << 20];
        back.copy_to(&mut read);
        assert!(read == bytes, "{format}");
    }
}

#[test]
fn discard_and_zeroes_free_space_of_raw_images() {
    use std::os::unix::fs::MetadataExt;
    let dir = scratch();
    let path = raw_file(&dir, &vec![3; 1 << 20]);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    disk.flush().unwrap();
    let before = std::fs::metadata(&path).unwrap().blocks();
    disk.discard(0, 256 << 10).unwrap();
    disk.write_zeroes(512 << 10, 256 << 10, true).unwrap();
    disk.write_zeroes(1000, 24, false).unwrap();
    disk.write_zeroes(300 << 10, 512, false).unwrap();
    disk.flush().unwrap();
    let meta = std::fs::metadata(&path).unwrap();
    assert!(meta.blocks() < before, "{} < {before}", meta.blocks());
    assert_eq!(meta.len(), 1 << 20);
    let mut data = vec![1; 1 << 20];
    disk.read_at(0, &mut data).unwrap();
    for (at, byte) in [(0, 0), (300 << 10, 0), ((300 << 10) + 512, 3), (512 << 10, 0), ((768 << 10) - 1, 0), (768 << 10, 3)] {
        assert_eq!(data[at], byte, "{at}");
    }
}

#[test]
fn qcow2_is_what_qemu_says_it_is() {
    for options in ["", "cluster_size=4096", "compat=0.10", "lazy_refcounts=on"] {
        let dir = scratch();
        let path = qcow2_file(&dir, "8M", options);
        let mut want = vec![0u8; 8 << 20];
        {
            let disk = open(&DiskSpec::new(&path)).unwrap_or_else(|error| panic!("{options}: {error}"));
            assert_eq!(disk.size(), 8 << 20);
            for (offset, len, byte) in [(0, 512, 1u8), (65536 - 512, 1024, 2), (3 << 20, 300 << 10, 3), ((8 << 20) - 512, 512, 4)] {
                disk.write_at(offset as u64, &vec![byte; len]).unwrap();
                want[offset..offset + len].fill(byte);
            }
            disk.write_zeroes(3 << 20, 512, false).unwrap();
            disk.write_zeroes((3 << 20) + (64 << 10), 128 << 10, true).unwrap();
            want[3 << 20..(3 << 20) + 512].fill(0);
            want[(3 << 20) + (64 << 10)..(3 << 20) + (192 << 10)].fill(0);
            disk.flush().unwrap();
            let mut back = vec![9; 8 << 20];
            disk.read_at(0, &mut back).unwrap();
            assert!(back == want, "{options}");
        }
        let flat = dir.path().join("flat");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), flat.to_str().unwrap()]);
        assert!(std::fs::read(&flat).unwrap() == want, "{options}: qemu-img reads something else");
        qemu_img(&["check", "-q", path.to_str().unwrap()]);
    }
}

#[test]
fn flushed_qcow2_data_survives_without_a_clean_end() {
    let dir = scratch();
    let path = qcow2_file(&dir, "4M", "");
    let disk = open(&DiskSpec::new(&path)).unwrap();
    disk.write_at(1 << 20, &[6; 4096]).unwrap();
    disk.flush().unwrap();
    // As after a power failure: what is in the file now.
    let copy = dir.path().join("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    let other = open(&DiskSpec::new(&copy)).unwrap();
    let mut data = [0; 4096];
    other.read_at(1 << 20, &mut data).unwrap();
    assert_eq!(data, [6; 4096]);
}

#[test]
fn compressed_clusters_are_read_and_written_over() {
    let dir = scratch();
    let plain = raw_file(&dir, &vec![8; 1 << 20]);
    let path = dir.path().join("small.qcow2");
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", plain.to_str().unwrap(), path.to_str().unwrap()]);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    disk.write_at(512, &[9; 512]).unwrap();
    let mut data = [0; 2048];
    disk.read_at(0, &mut data).unwrap();
    assert_eq!((data[0], data[512], data[1024]), (8, 9, 8));
}

#[test]
fn an_image_is_opened_by_one_writer_or_many_readers() {
    let dir = scratch();
    for path in [raw_file(&dir, &[0; 4096]), qcow2_file(&dir, "1M", "")] {
        let read_only = DiskSpec { read_only: true, ..DiskSpec::new(&path) };
        {
            let _writer = open(&DiskSpec::new(&path)).unwrap();
            assert!(message(&DiskSpec::new(&path)).contains("is in use by another machine"));
            assert!(message(&read_only).contains("is in use by another machine"));
        }
        let first = open(&read_only).unwrap();
        let _second = open(&read_only).unwrap();
        assert!(message(&DiskSpec::new(&path)).contains("is in use by another machine"));
        assert!(first.write_at(0, &[0; 512]).is_err());
    }
}

#[test]
fn qemu_and_we_do_not_open_the_same_image() {
    let dir = scratch();
    let path = qcow2_file(&dir, "1M", "");
    let _disk = open(&DiskSpec::new(&path)).unwrap();
    let output = Command::new("qemu-img").args(["check", path.to_str().unwrap()]).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("lock"));
}

#[test]
fn the_format_is_found_by_its_mark() {
    let dir = scratch();
    let path = dir.path().join("image");
    for (format, name) in
        [("vmdk", "VMDK"), ("vhdx", "VHDX"), ("vdi", "VDI"), ("vpc", "VHD"), ("qed", "QED"), ("qcow", "qcow image of version 1")]
    {
        qemu_img(&["create", "-q", "-f", format, path.to_str().unwrap(), "1M"]);
        let text = message(&DiskSpec::new(&path));
        assert!(text.contains(name) && text.contains("qemu-img convert"), "{text}");
        let forced = DiskSpec { format: Some(Format::Raw), ..DiskSpec::new(&path) };
        open(&forced).unwrap();
    }
}

#[test]
fn what_is_no_disk_is_told_so() {
    let dir = scratch();
    assert!(message(&DiskSpec::new(dir.path().join("none"))).contains("No such file"));
    assert!(message(&DiskSpec::new(dir.path())).contains("is a directory"));
    assert!(message(&DiskSpec::new("/dev/null")).contains("file or a block device"));
    assert!(message(&DiskSpec::new(raw_file(&dir, &[]))).contains("is empty"));
}

#[test]
fn a_raw_file_asked_for_as_qcow2_is_refused() {
    let dir = scratch();
    let spec = DiskSpec { format: Some(Format::Qcow2), ..DiskSpec::new(raw_file(&dir, &[1; 65536])) };
    assert!(message(&spec).contains("not a usable qcow2 image"));
}

#[test]
fn a_guest_cannot_turn_a_guessed_raw_disk_into_another_format() {
    let dir = scratch();
    let path = raw_file(&dir, &[0; 8192]);
    let disk = open(&DiskSpec::new(&path)).unwrap();
    let mut sector = [0; 512];
    sector[..4].copy_from_slice(b"QFI\xfb");
    assert_eq!(disk.write_at(0, &sector).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    let memory = vmm::memory::map(&[(0, 4096)]).unwrap();
    let slice = memory.get_slice(GuestAddress(0), 512).unwrap();
    slice.copy_from(&sector);
    let halves = [slice.subslice(0, 2).unwrap(), slice.subslice(2, 510).unwrap()];
    assert_eq!(disk.write_from_guest(0, &halves).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    disk.write_at(512, &sector).unwrap();
    drop(disk);
    let disk = open(&DiskSpec { format: Some(Format::Raw), ..DiskSpec::new(&path) }).unwrap();
    disk.write_at(0, &sector).unwrap();
}

#[test]
fn backing_files_are_opened_only_when_asked_for() {
    let dir = scratch();
    let base = raw_file(&dir, &vec![7; 1 << 20]);
    let path = dir.path().join("top.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.to_str().unwrap(), path.to_str().unwrap()]);
    let text = message(&DiskSpec::new(&path));
    assert!(text.contains("backing=on") && text.contains("disk.raw"), "{text}");
    let disk = open(&DiskSpec { follow_references: true, ..DiskSpec::new(&path) }).unwrap();
    let mut data = [0; 512];
    disk.write_at(0, &[1; 512]).unwrap();
    disk.read_at(512, &mut data).unwrap();
    assert_eq!(data, [7; 512]);
    drop(disk);
    assert_eq!(std::fs::read(&base).unwrap(), vec![7; 1 << 20]);
}

#[test]
fn corrupt_qcow2_images_are_refused_or_fail_without_harm() {
    let dir = scratch();
    let good = {
        let path = qcow2_file(&dir, "16M", "");
        let disk = open(&DiskSpec::new(&path)).unwrap();
        disk.write_at(0, &[1; 65536]).unwrap();
        disk.write_at(8 << 20, &[2; 65536]).unwrap();
        drop(disk);
        std::fs::read(&path).unwrap()
    };
    let path = dir.path().join("bad.qcow2");
    let patch = |edits: &[(usize, &[u8])]| {
        let mut bytes = good.clone();
        for (offset, value) in edits {
            bytes[*offset..*offset + value.len()].copy_from_slice(value);
        }
        std::fs::write(&path, bytes).unwrap();
    };
    // Offsets from QEMU's docs/interop/qcow2.txt.
    for (what, edits) in [
        ("version", &[(4usize, &[0u8, 0, 0, 9][..])][..]),
        ("cluster bits too large", &[(20, &[0, 0, 0, 60])]),
        ("cluster bits zero", &[(20, &[0, 0, 0, 0])]),
        ("L1 table too large", &[(36, &[0xff; 4])]),
        ("L1 table outside", &[(40, &[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0])]),
        ("L1 table not aligned", &[(40, &[0, 0, 0, 0, 0, 3, 0, 1])]),
        ("unknown incompatible feature", &[(72, &[0x80, 0, 0, 0, 0, 0, 0, 0])]),
        ("no refcount table", &[(56, &[0, 0, 0, 0])]),
        ("no first refcount block", &[(65536, &[0; 8])]),
        ("header is free", &[(131072, &[0; 2])]),
        ("marked corrupt", &[(72, &[0, 0, 0, 0, 0, 0, 0, 2])]),
        ("encrypted", &[(32, &[0, 0, 0, 1])]),
    ] {
        patch(edits);
        let text = open(&DiskSpec::new(&path)).err().unwrap_or_else(|| panic!("{what}: opened")).to_string();
        assert!(text.contains("not a usable qcow2 image"), "{what}: {text}");
    }
    std::fs::write(&path, &good[..60]).unwrap();
    assert!(message(&DiskSpec::new(&path)).contains("not a usable qcow2 image"), "truncated header");
    // Any byte of the header and the tables changed: refused, or I/O that ends one way or another.
    for offset in (0..104).chain((65536..good.len().min(400_000) - 8).step_by(8192)) {
        for value in [&[0u8][..], &[1], &[0xff], &[0; 8]] {
            patch(&[(offset, value)]);
            if let Ok(disk) = open(&DiskSpec { format: Some(Format::Qcow2), ..DiskSpec::new(&path) }) {
                let size = disk.size();
                let mut data = [0; 512];
                for at in [0, 8 << 20, size / 2 / 512 * 512, size - 512] {
                    let at = if at < size { at } else { 0 };
                    let _ = disk.read_at(at, &mut data);
                    let _ = disk.write_at(at, &data);
                    let _ = disk.discard(at, 512);
                }
            }
        }
    }
}

#[test]
fn a_full_host_is_an_error_and_not_a_crash() {
    let dir = scratch();
    let path = dir.path().join("sparse.raw");
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(&[0; 512]).unwrap();
    file.set_len(1 << 40).unwrap();
    let disk = open(&DiskSpec::new(&path)).unwrap();
    assert_eq!(disk.size(), 1 << 40);
    let mut data = [1; 512];
    disk.read_at((1 << 40) - 512, &mut data).unwrap();
    assert_eq!(data, [0; 512]);
}
